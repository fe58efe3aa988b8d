"""What ends a run leaves its last whole step behind, and never broken weights."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemWriter

from gspo_moe.cli import main
from gspo_moe.config.checkpoints import newest_checkpoint
from gspo_moe.errors import RewardError
from gspo_moe.observability.jsonl import JsonLines
from gspo_moe.parallel.groups import shut_down
from gspo_moe.training import loop
from gspo_moe.training.rl import StepResult, rl_step
from gspo_moe.training.run_log import RunLog
from gspo_moe.training.saving import save_whole_step
from gspo_moe.training.session import Session, Trainer
from gspo_moe.types import RolloutGroup
from tests.unit.training.test_rl import SMALL, opened

QUIET = ("logging.progress=false", "checkpoint.export_hf=false", "evaluation.prompts=2", "schedule.steps=3")


def newest(trainer: Trainer) -> str | None:
    found = newest_checkpoint(trainer.checkpoints)
    return None if found is None else found.name


def test_the_last_whole_step_is_saved_once_and_unbroken(tmp_path: Path) -> None:
    with opened(tmp_path) as trainer:
        log = RunLog(trainer)
        assert save_whole_step(trainer, log) == "Nothing is saved: no step was whole"
        rl_step(trainer)
        told = f"{trainer.checkpoints}/step_00000001 holds its last whole step; the same command goes on from there"
        assert save_whole_step(trainer, log) == told
        written = trainer.checkpoints.joinpath("step_00000001").stat().st_mtime_ns
        assert save_whole_step(trainer, log) == told
        assert trainer.checkpoints.joinpath("step_00000001").stat().st_mtime_ns == written

        rl_step(trainer)
        weight = trainer.session.model.gpt_chunks[0].decoder.final_layernorm.weight
        with torch.no_grad():
            weight[3] = float("inf")
        told = save_whole_step(trainer, log)
        assert told.startswith("not finite after step 2, which is therefore not saved: decoder.final_layernorm.weight")
        assert newest(trainer) == "step_00000001"
        with torch.no_grad():
            weight[3] = 1.0
        trainer.optimizer.zero_grad()
        trainer.optimizer.update()
        assert "step_00000001 holds its last checkpoint: the step that it was in" in save_whole_step(trainer, log)
        assert newest(trainer) == "step_00000001"
        log.close()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\n")
    return ["train", str(config), *SMALL, *QUIET, f"logging.run_dir={tmp_path / 'run'}"]


def test_a_foreseen_error_and_a_signal_save_the_last_whole_step(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks_at_2(trainer: Trainer) -> StepResult:
        if trainer.progress.step == 1:
            raise RewardError("no reward")
        return rl_step(trainer)

    def is_signalled_in_3(trainer: Trainer) -> StepResult:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rl_step(trainer)

    run = tmp_path / "run"
    monkeypatch.setattr(loop, "rl_step", breaks_at_2)
    assert main(command) == RewardError.exit_code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"gspo-moe: RewardError: no reward. {run}/checkpoints/step_00000001 holds its last whole step; the same "
        "command goes on from there"
    )
    monkeypatch.setattr(loop, "rl_step", is_signalled_in_3)
    behind = "checkpoint={interval: 1, background: true, export_hf: false}"
    assert main([*command, behind]) == 0
    saved = [path.name for path in sorted((run / "checkpoints").iterdir())]
    # The signal ends the third step before it samples.
    assert saved == ["step_00000001", "step_00000002"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert main(command) == 0
    text = (run / "metrics.jsonl").read_text()
    assert [text.count(f'"step": {step}, ') > 0 for step in range(4)] == [True] * 4
    assert text.count("eval/accuracy") == 2


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("evaluation.keep_answers=true", "evaluation.samples=3", "evaluation.pass_at=[1, 2]")
    command = [*command, "schedule.steps=1", *kept]
    evaluate = Session.evaluate

    def is_signalled_at_the_end(session: Session, when: str) -> list[RolloutGroup]:
        if when != "after step 0":
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(session, when)

    monkeypatch.setattr(Session, "evaluate", is_signalled_at_the_end)
    assert main(command) == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert metrics.read_text().count("eval/accuracy") == 1
    monkeypatch.undo()
    assert main(command) == 0
    evaluations = [one for one in map(json.loads, metrics.read_text().splitlines()) if "eval/accuracy" in one]
    assert len(evaluations) == 2
    for one in evaluations:
        assert one["eval/pass_at/1"] == pytest.approx(one["eval/accuracy"])
        file = tmp_path / "run" / "evaluations" / f"step_{one['step']}.jsonl"
        answers = [answer for line in file.read_text().splitlines() for answer in json.loads(line)["answers"]]
        assert len(answers) == 2 * 3
        assert sum(answer["reward"] for answer in answers) / 6 == pytest.approx(one["eval/reward"])
        assert sum(answer["tokens"] for answer in answers) / 6 == pytest.approx(one["eval/response_length"])


def test_updates_that_are_all_skipped_end_the_run(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def has_infinite_gradients(trainer: Trainer) -> StepResult:
        trainer.optimizer.megatron.get_grad_norm = lambda: math.inf
        return rl_step(trainer)

    monkeypatch.setattr(loop, "rl_step", has_infinite_gradients)
    assert main([*command, "optimizer.max_skipped_updates=7", "schedule.steps=9"]) == 5
    error = capsys.readouterr().err
    assert "optimizer.max_skipped_updates=7 ends the run: lower optimizer.lr" in error
    assert sum("updates were skipped" in record.message for record in caplog.records) == 1
    files = sorted((tmp_path / "run" / "skipped").glob("step_*"))
    assert len(files) == 8
    with safe_open(files[0], framework="pt") as file:
        described = json.loads(file.metadata()["minibatch"])
        assert (described["step"], described["mini_batch"], described["grad_norm"]) == (1, 1, "inf")
        packs = range(len(described["samples"]))
        assert sum(int(file.get_tensor(f"pack_{i}/response_mask_T").sum()) for i in packs) == described["num_tokens"]
        assert all(file.get_tensor(f"pack_{i}/advantages_N").isfinite().all() for i in packs)


def test_without_checkpoints_a_run_ends_whole_and_is_not_gone_on_with(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks_at_2(trainer: Trainer) -> StepResult:
        if trainer.progress.step == 1:
            raise RewardError("no reward")
        return rl_step(trainer)

    run = tmp_path / "run"
    off = [*command, "checkpoint={keep: 0, interval: 1, export_hf: true}", "schedule.steps=2"]
    monkeypatch.setattr(loop, "rl_step", breaks_at_2)
    assert main(off) == RewardError.exit_code
    assert capsys.readouterr().err.endswith("RewardError: no reward. Nothing is saved, as checkpoint.keep=0 asks\n")
    assert main(off) == 2
    told = capsys.readouterr().err
    assert f"logging.run_dir={run} holds a run of checkpoint.keep=0, which cannot be gone on with; name another" in told
    assert not (run / "finished").exists()
    monkeypatch.undo()
    (run / "metrics.jsonl").unlink()
    assert main(off) == 0
    assert "checkpoints/" not in capsys.readouterr().out
    assert not (run / "checkpoints").exists()
    assert (run / "hf" / "model.safetensors").is_file()
    assert (run / "finished").read_text() == "2 steps\n"
    assert main(off) == 2


@pytest.mark.parametrize("broken", ["metrics", "checkpoint"])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_whole_checkpoint(
    broken: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it fills up at the second step, which is the last."""
    flushed, whole = JsonLines.flush, FileSystemWriter.write_data
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(lines: JsonLines) -> None:
        if any(b'"step": 2' in line for line in lines._waiting):
            raise full
        flushed(lines)

    def write_data(writer: FileSystemWriter, *plan: Any) -> Any:
        if "step_00000002" in str(writer.path):
            (Path(writer.path) / "torn").write_bytes(b"1")
            raise full
        return whole(writer, *plan)

    if broken == "metrics":
        monkeypatch.setattr(JsonLines, "flush", flush)
    else:
        monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    try:
        assert main([*command, "checkpoint.interval=1", "schedule.steps=2"]) == 2
    finally:
        shut_down()  # the process would have ended
    told = [line for line in capsys.readouterr().err.splitlines() if "lines could not be written" not in line]
    saved, rescued = tmp_path / "run" / "checkpoints", tmp_path / "run.rescued" / "step_00000002"
    where = "what the run has logged" if broken == "metrics" else f"{saved / rescued.name}"
    why = f"gspo-moe: OutputError: {where} could not be written ([Errno 28] No space left on device). "
    if broken == "metrics":
        assert told == [
            f"{why}{rescued} holds its last whole step: move that to {saved} and start the same command to go on"
        ]
    else:
        assert told == [f"{why}Nor is it saved elsewhere: {rescued} could not be written ([Errno 28] {full.strerror})"]
    assert [path.name for path in saved.iterdir()] == ["step_00000001"]


def test_a_check_says_what_a_run_needs_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("parallel: {expert: 4}\n")
    check = [
        "train",
        str(config),
        *SMALL,
        "--check",
        "rollout.prompts_per_step=8",
        f"logging.run_dir={tmp_path / 'run'}",
    ]
    assert main([*check, "--world-size", "8"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["layout"] == "data 8, expert 4, expert_data 2 on 8 processes"
    assert rows["memory"].endswith("in generation")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    for arguments, message in (
        (["--world-size", "6"], "does not divide the 6 processes"),
        (["--world-size", "0"], "--world-size 0: give a whole number from 1 up"),
        (["task.options.min_lenght=3"], "task.options.min_length"),
    ):
        assert main([*check, *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(check) == 0
    assert "on 4 processes" in capsys.readouterr().out
    assert main(["train", str(config), "--world-size", "8"]) == 2
    assert "--world-size is what --check plans for" in capsys.readouterr().err
