"""Reads a run's folder back: its metrics as arrays, its config, and what was wrong with its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gspo_moe.config.loading import read_yaml
from gspo_moe.errors import DataError
from gspo_moe.observability.jsonl import read_json_lines
from gspo_moe.observability.layers import FILE, read_layers

NOT_METRICS = ("step", "time")
STARTS_FILE = "starts.jsonl"
FINAL_SHARE = 0.1
LATEST = 253_402_214_400  # seconds: the end of the year 9999, and of dates


@dataclass(frozen=True)
class Run:
    """A run as its files tell it.

    config: the resolved config as plain values, unchecked so that older runs can be read; empty without config.yaml.
    problems: what was left out while reading, in words.
    series: steps (int64) and values (float64, NaN where the value was not finite), ascending, by metric name; the last
        of several values written at one step counts.
    layers: the same of figures by layer, values [S, A] or [S, A, ...]; empty without routing_layers.safetensors. The
        schema is in `observability.layers`.
    times: when the first and the last line of metrics were written, unix seconds; None without any.
    starts: what starts.jsonl tells of each start, in order; empty for runs of versions that kept none.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    problems: tuple[str, ...]
    series: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    times: tuple[float, float] | None = field(default=None, repr=False)
    starts: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.series))

    def steps(self, name: str) -> np.ndarray:
        """Steps at which `name` was written, int64; raises KeyError for a metric this run does not have."""
        return self.series[name][0]

    def values(self, name: str) -> np.ndarray:
        """Values of `name` at `steps(name)`, float64; raises KeyError for a metric this run does not have."""
        return self.series[name][1]

    def mean(self, name: str, before: int | None = None) -> float:
        """Mean of the finite values of `name` over the run, or its steps before `before`; NaN where there is none."""
        if name not in self.series:
            return math.nan
        steps, values = self.series[name]
        return _finite_mean(values if before is None else values[steps < before])

    def final(self, name: str) -> float:
        """Mean of the finite values among the last tenth (at least one) of those written; NaN where there is none."""
        if name not in self.series:
            return math.nan
        values = self.series[name][1]
        return _finite_mean(values[-max(1, round(len(values) * FINAL_SHARE)) :])


def load_run(path: str | Path) -> Run:
    """Reads the run folder `path`; raises DataError when it holds no metrics.jsonl or a damaged one."""
    folder = Path(path)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{metrics} does not exist; give the folder of a run (logging.run_dir)")
    records, problems = read_json_lines(metrics)
    by_name: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in NOT_METRICS:
                if not _is_number(value):
                    given = f"{name[:60]} is {repr(value)[:60]}"
                    raise DataError(f"{metrics}, step {record['step']}: {given}, no number; mend that line")
                by_name.setdefault(name, {})[record["step"]] = math.nan if value is None else value
    series = {name: _arrays(values) for name, values in by_name.items()}
    config_file = folder / "config.yaml"
    config = read_yaml(config_file) if config_file.is_file() else {}
    layers = read_layers(folder / FILE) if (folder / FILE).is_file() else {}
    times = [record["time"] for record in records if _is_time(record.get("time"))]
    starts, torn = read_json_lines(folder / STARTS_FILE) if (folder / STARTS_FILE).is_file() else ([], [])
    span = (min(times), max(times)) if times else None
    return Run(folder, config, (*problems, *torn), series, layers, span, tuple(starts))


def _is_number(value: Any) -> bool:
    """Or null, which stands for a value that was not finite."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LATEST


def _arrays(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(values)
    return np.array(steps, dtype=np.int64), np.array([values[step] for step in steps], dtype=np.float64)


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
