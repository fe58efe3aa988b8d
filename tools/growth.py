"""The curves of `benchmark_growth.py`: which size grows over which points, and how its figures should grow with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FITTED = 3  # points of the upper part, over which the exponent is fitted
ALLOWED = 0.2  # beyond the expected exponent: caches, and noise of a few points
CPU_SECONDS, MEMORY = "cpu_seconds", "memory_gib"
COUNTED = {"rollout": "rollout", "old_log_probs": "old_log_probs", "forward_backward": "training"}


@dataclass(frozen=True)
class Curve:
    """of: what grows. points: its values, and the overrides at each. order: of the seconds of a phase, at most.

    processes: the points are numbers of processes, else there is one; what they send is measured then, and no time.
    """

    of: str
    points: Mapping[int, tuple[str, ...]]
    order: float = 1.0
    processes: bool = False


def _sizes(key: str, *values: int) -> dict[int, tuple[str, ...]]:
    return {value: (f"{key}={value}",) for value in values}


CURVES = {
    "sequence": Curve("answer tokens", _sizes("rollout.max_response_tokens", 32, 64, 128, 256, 512)),
    "batch": Curve("answers to a prompt", _sizes("rollout.samples_per_prompt", 4, 8, 16, 32)),
    "vocabulary": Curve("words", _sizes("model.overrides.vocab_size", 4096, 16384, 32768, 65536, 131072)),
    "experts": Curve("experts", _sizes("model.overrides.num_experts", 8, 16, 32, 64, 128), order=0.0),
    "layers": Curve("layers", _sizes("model.overrides.num_hidden_layers", 2, 4, 8, 16)),
    "data": Curve("data-parallel processes", {2: (), 4: ()}, processes=True),
    "expert": Curve(
        "expert-parallel processes", {2: ("parallel.expert=2",), 4: ("parallel.expert=4",)}, processes=True
    ),
}


@dataclass(frozen=True)
class Fit:
    """Growth of one figure: it goes as size ^ exponent over the upper points, and should at most as size ^ expected."""

    figure: str
    exponent: float
    expected: float

    @property
    def holds(self) -> bool:
        return self.exponent <= self.expected + ALLOWED


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of least squares of log value against log size over the last `FITTED` points; 0 for values of 0."""
    x, y = ([math.log(value) for value in series[-FITTED:] if value > 0] for series in (sizes, values))
    if len(y) < len(x):
        return 0.0
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def point_figures(figures: Mapping[str, Any], together_gib: float, processes: bool) -> dict[str, float]:
    """What of a run is a point: CPU seconds, which other work on the machine hardly changes, and memory."""
    if processes:
        counted = figures["communication"]
        return {"messages": counted["messages"], "sent_bytes": counted["sent_bytes"]}
    seconds = figures["cpu_seconds"]
    found = {f"{phase}_{CPU_SECONDS}": seconds[phase] for phase in ("step", "rollout", "old_log_probs", "update")}
    found[f"forward_backward_{CPU_SECONDS}"] = seconds["training"] - seconds["update"]
    return found | {MEMORY: together_gib}


def fits(
    curve: Curve, sizes: Sequence[int], runs: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, float]]
) -> list[Fit]:
    """Each figure's exponent beside the expected one.

    Expected of seconds: the curve's order, or the exponent of the operations that the model needs, where attention's
    square makes it larger; of the update's: that of the parameters; of a process's messages and bytes: none.
    """
    found = []
    for figure in points[0]:
        values = [point[figure] for point in points]
        found.append(Fit(figure, exponent(sizes, values), _expected(curve, figure, sizes, runs)))
    return found


def _expected(curve: Curve, figure: str, sizes: Sequence[int], runs: Sequence[Mapping[str, Any]]) -> float:
    if curve.processes:
        return 0.0
    if figure == MEMORY:
        return 1.0
    phase = figure.removesuffix(f"_{CPU_SECONDS}")
    if phase == "update":
        return exponent(sizes, [run["parameters"] for run in runs])
    names = list(COUNTED.values()) if phase == "step" else [COUNTED[phase]]
    needed = [sum(sum(run["tflop"][name].values()) for name in names) for run in runs]
    return max(exponent(sizes, needed), curve.order)
