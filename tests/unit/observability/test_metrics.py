from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_moe.config.schema import WandbConfig
from gspo_moe.errors import ConfigError
from gspo_moe.observability import load_run
from gspo_moe.observability.metrics import MetricsWriter


def _scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_line_and_one_tensorboard_value_a_metric(tmp_path: Path) -> None:
    before = time.time()
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.1, "groups/count": 32})
        writer.write(2, {"reward/mean": 0.25})
        writer.write(2, {"eval/accuracy": 0.5})
    lines = _lines(tmp_path)
    assert all(before <= line.pop("time") <= time.time() for line in lines)
    assert lines == [
        {"step": 1, "reward/mean": 0.1, "groups/count": 32.0},
        {"step": 2, "reward/mean": 0.25},
        {"step": 2, "eval/accuracy": 0.5},
    ]
    assert _scalars(tmp_path, "reward/mean") == [(1, pytest.approx(0.1)), (2, 0.25)]
    assert _scalars(tmp_path, "eval/accuracy") == [(2, 0.5)]


def test_values_that_are_not_finite_are_null_and_read_as_nan(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss/policy": math.nan, "reward/mean": math.inf, "kl/old_k3": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss/policy"], line["reward/mean"], line["kl/old_k3"]) == (None, None, 0.5)
    assert math.isnan(load_run(tmp_path).values("loss/policy")[0])


def test_unknown_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(KeyError, match="reward/median"):
        writer.write(1, {"reward/mean": 1.0, "reward/median": 1.0})
    assert _lines(tmp_path) == []


def test_a_continued_run_reads_as_one_run(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (0, 1, 2, 3):
            writer.write(step, {"reward/mean": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"reward/mean": 30})
    assert [(line["step"], line["reward/mean"]) for line in _lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert _scalars(tmp_path, "reward/mean") == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_a_run_without_checkpoint_starts_anew(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"reward/mean": 7})
        writer.write(1, {"reward/mean": 8})
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"reward/mean": 1})
    assert [line["reward/mean"] for line in _lines(tmp_path)] == [1]
    assert _scalars(tmp_path, "reward/mean") == [(0, 1)]


def test_wandb_that_is_not_installed_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricsWriter(tmp_path, wandb=WandbConfig(project="p"))


def test_a_wandb_that_is_itself_broken_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import a_module_that_wandb_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_wandb_needs"):
        MetricsWriter(tmp_path / "run", wandb=WandbConfig(project="p"))


def test_wandb_gets_the_config_every_value_and_the_same_run_when_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def init(**arguments: Any) -> SimpleNamespace:
        started.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or f"run{len(started)}",
            log=logged.append,
            define_metric=lambda *names, **options: None,
            finish=lambda: None,
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = WandbConfig(project="p", name="n", mode="offline")
    for resume_step in (0, 2, 0):
        with MetricsWriter(tmp_path, resume_step=resume_step, wandb=settings, config_dump={"seed": 1}) as writer:
            writer.write(resume_step + 1, {"reward/mean": 0.5})
    assert [arguments["id"] for arguments in started] == [None, "run1", None]
    wanted = {"project": "p", "name": "n", "mode": "offline", "config": {"seed": 1}}
    assert wanted.items() <= started[0].items()
    assert logged == [{"step": step, "reward/mean": 0.5} for step in (1, 3, 1)]


def test_a_wandb_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class UsageError(Exception):
        __module__ = "wandb.errors.errors"

    def init(**_: Any) -> None:
        raise UsageError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(
        ConfigError, match=r"mode online: wandb could not start \(No API key configured\); mend that, or"
    ):
        MetricsWriter(tmp_path, wandb=WandbConfig(project="p", mode="online"))
