"""Runs whose figures leave the bounds of `guard`: ended, or taken back, killed meanwhile and gone on with."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.cli import main
from gspo_moe.model.hf import export_hf
from gspo_moe.training import loop
from gspo_moe.training.rl import StepResult, rl_step
from gspo_moe.training.session import Trainer
from tests.support.stand_in import Running
from tests.unit.training.test_rl import SMALL, opened
from tests.unit.training.test_saving import QUIET

ENTROPY = (*QUIET, "schedule.steps=8", "checkpoint.interval=2", "checkpoint.keep=1", "evaluation.prompts=0")


class Collapsing:
    """Steps whose entropy is 0.1 from a step on until it was taken back as often as `times`; notes what they used."""

    def __init__(self, first: int, times: int) -> None:
        self.first, self.times = first, times
        self.signal_at: int | None = None
        self.used: list[tuple[int, str, float]] = []

    def __call__(self, trainer: Trainer) -> StepResult:
        found = rl_step(trainer)
        step, bad = trainer.progress.step, len(trainer.roll_backs) < self.times
        rate = found.metrics["optimizer/learning_rate"]
        self.used.append((step, found.batch.prompts[0].uid, rate))
        if self.signal_at == step and trainer.roll_backs:
            os.kill(os.getpid(), signal.SIGTERM)
        entropy = {"policy/entropy": 0.1} if step >= self.first and bad else {}
        return replace(found, metrics={**found.metrics, **entropy})


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text("guard: {entropy: {low: 0.5}, patience: 3}\n")
    return ["train", str(config), *SMALL, *ENTROPY, f"logging.run_dir={tmp_path / 'run'}"]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def records(file: Path) -> list[dict[str, Any]]:
    return [one for one in map(json.loads, file.read_text().splitlines()) if "guard/bad_steps" in one]


def test_a_collapse_ends_the_run_and_its_sound_checkpoint_stays(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "rl_step", Collapsing(first=4, times=1))
    assert main(command) == 6
    # keep=1 alone would have left nothing but what was saved in the midst of the bad steps.
    assert names(run) == ["step_00000002", "step_00000004"]
    assert [one["guard/bad_steps"] for one in records(run / "metrics.jsonl")] == [0, 0, 0, 1, 2, 3]
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "gspo-moe: CollapseError: policy/entropy is 0.1, not at least guard.entropy.low=0.5, and was out of its bounds "
        "in each step from 4 to 6; guard.action=stop ends the run: lower optimizer.lr"
    )
    assert f"{run}/checkpoints/step_00000002 is from before that. {run}/checkpoints/step_00000004 holds its" in told
    # The start after it remembers step 4, which its checkpoint knows, and ends no later.
    assert main(command) == 6
    assert [one["guard/bad_steps"] for one in records(run / "metrics.jsonl")] == [0, 0, 0, 1, 2, 3]


def test_a_collapse_is_taken_back_and_a_kill_changes_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    back = [*command, "guard.action=roll_back", "guard.lr_factor=0.5"]
    whole, killed = Collapsing(first=4, times=1), Collapsing(first=4, times=1)
    monkeypatch.setattr(loop, "rl_step", whole)
    assert main(back) == 0
    assert [step for step, *_ in whole.used] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8]
    uids = [uid for _, uid, _ in whole.used]
    assert uids == [f"train/{4 * number}" for number in range(12)]  # none comes twice
    assert [rate for *_, rate in whole.used] == [1e-2] * 6 + [5e-3] * 6
    assert f"the run goes on from {run}/checkpoints/step_00000002 with other prompts and 0.5 times" in caplog.text
    assert names(run) == ["step_00000004.collapsed", "step_00000008"]
    found = records(run / "metrics.jsonl")
    assert [one["step"] for one in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [one["guard/roll_backs"] for one in found] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [one["step"] for one in records(run / "before_roll_back_1.metrics.jsonl")] == [1, 2, 3, 4, 5, 6]

    killed.signal_at = 3
    monkeypatch.setattr(loop, "rl_step", killed)
    elsewhere = [*back, f"logging.run_dir={other}"]
    assert main(elsewhere) == 0
    killed.signal_at = None
    assert main(elsewhere) == 0
    assert killed.used == whole.used
    timed = ("time", "timing/", "memory/", "throughput/tokens_per_second", "rollout/tokens_per_second")

    def untimed(folder: Path) -> list[dict[str, float]]:
        lines = records(folder / "metrics.jsonl")
        return [{name: value for name, value in one.items() if not name.startswith(timed)} for one in lines]

    assert untimed(other) == untimed(run)


@pytest.mark.slow
def test_a_start_from_the_checkpoint_that_was_gone_back_to_knows_of_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right behind the roll-back leaves nothing but its record."""
    back = [*command, "guard.action=roll_back", "checkpoint.keep=4"]
    whole = Collapsing(first=4, times=1)
    monkeypatch.setattr(loop, "rl_step", whole)
    assert main([*back, "schedule.steps=7"]) == 0
    for name in ("step_00000004", "step_00000006", "step_00000007"):
        (tmp_path / "run" / "checkpoints" / name).rename(tmp_path / name)
    again = Collapsing(first=4, times=1)
    monkeypatch.setattr(loop, "rl_step", again)
    assert main([*back, "schedule.steps=7"]) == 0
    assert again.used == whole.used[6:]


@pytest.mark.parametrize("signal_at", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ahead_of_its_servers_is_taken_back_with_them(
    signal_at: int | None, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal right behind the roll-back loses none of the prompts that were asked for ahead."""
    with opened(tmp_path / "first") as trainer:
        export_hf(trainer.session.model, tmp_path / "hf", trainer.session.plan.tokenizer)
    server = Running(tmp_path / "hf")
    back = [
        *command,
        f"model={{hf: {tmp_path / 'hf'}}}",
        "rollout.engine=vllm",
        f"rollout.servers.urls=['{server.url}']",
        "rollout.max_staleness=1",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "algorithm.mini_batches=2",
        "checkpoint.interval=1",
        "checkpoint.keep=3",
        "guard.action=roll_back",
        "guard.patience=1",
        "schedule.steps=4",
    ]
    steps = Collapsing(first=3, times=1)
    steps.signal_at = signal_at
    monkeypatch.setattr(loop, "rl_step", steps)
    try:
        assert main(back) == 0
        if signal_at is not None:
            steps.signal_at = None
            assert main(back) == 0
    finally:
        server.stop()
    assert [step for step, *_ in steps.used] == [1, 2, 3, 2, 3, 4]
    assert [uid for _, uid, _ in steps.used] == [f"train/{2 * number}" for number in range(6)]
    found = records(tmp_path / "run" / "metrics.jsonl")
    assert [one["guard/roll_backs"] for one in found] == [0, 1, 1, 1]
    assert [one["policy_version"] for one in found] == [2 * step for step in range(1, 5)]
    assert found[1]["lag/max"] == 0, "what was sampled ahead is given up"
    for one in found:
        assert one["lag/max"] <= 1
        assert one.get("mismatch/k3/lag_0", 0.0) < 1e-8, "the servers have the weights that the run went back to"


def test_it_goes_back_no_more_often_than_allowed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "rl_step", Collapsing(first=4, times=9))
    assert main([*command, "guard.action=roll_back", "guard.roll_backs=1", "guard.patience=1"]) == 6
    assert "guard.roll_backs=1 allows to go back no further time" in capsys.readouterr().err
    assert main([*command, "guard.action=roll_back", "guard.entropy.low=2e9", f"logging.run_dir={tmp_path / 'b'}"]) == 6
    told = capsys.readouterr().err
    assert "there is nothing to go back to" in told
    assert f"No checkpoint is from before step 1. {tmp_path / 'b'}/checkpoints/step_00000003 holds its last" in told
