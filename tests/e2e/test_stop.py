"""Signals, and the end of a run's time: the last whole step is saved, one line says so, the run can go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import FinishedRun
from tests.e2e.faults import Job, kill, nothing_goes_on
from tests.e2e.program import SMALL_RL, Program, gspo_moe, metrics_by_step, succeed

ACKNOWLEDGED = "the last whole step is saved, then it ends; a second signal ends it at once"


def check_end(program: Program, run: Path, cause: str) -> None:
    """The program ends well, in one line after that which took note of a signal."""
    outcome = program.finish()
    assert (outcome.code, outcome.left_behind) == (0, ())
    *_, first, last = outcome.stderr.splitlines()
    if cause.startswith("SIG"):
        assert first == f"gspo-moe: {cause}: {ACKNOWLEDGED}"
    saved = sorted((run / "checkpoints").iterdir())[-1]
    told = f"ended by {cause}. {saved} holds its last whole step; the same command goes on from there"
    assert last == f"gspo-moe: Interrupted: {told}"
    assert "Traceback" not in outcome.stderr


def test_neither_a_signal_nor_the_launchers_death_loses_a_whole_step(quickstart: FinishedRun, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", quickstart)
    command = job.command("checkpoint.interval=0")
    program = Program(command, tmp_path)
    program.wait_for(lambda: job.has_step(3))
    os.kill(program.pid, signal.SIGUSR1)
    check_end(program, job.run, "SIGUSR1")
    program = Program(command, tmp_path)
    program.wait_for(lambda: job.has_step(5))
    kill(program.pid)
    nothing_goes_on(program, job.run)
    assert len(list((job.run / "checkpoints").iterdir())) == 1
    succeed(command, tmp_path)
    job.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_other_signals_and_the_clock_do_the_same(name: str, quickstart: FinishedRun, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", quickstart)
    program = Program(job.command(), tmp_path)
    program.wait_for(lambda: job.has_step(2))
    os.kill(program.pid, signal.Signals[name])
    check_end(program, job.run, name)
    check_end(Program(job.command("schedule.exit_after=0.001"), tmp_path), job.run, "schedule.exit_after")
    program = Program(job.command(), tmp_path)
    program.wait_for(lambda: len(program.processes()) > 1)  # long before there is a run
    os.kill(program.pid, signal.Signals[name])
    outcome = program.finish()
    assert (outcome.code, outcome.left_behind) == (0, ())
    assert "Traceback" not in outcome.stderr
    succeed(job.command(), tmp_path)
    job.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_to_a_process_without_a_launcher(name: str, one_process: FinishedRun, tmp_path: Path) -> None:
    model, run = one_process.path.parent / "model", tmp_path / "run"
    (tmp_path / "config.yaml").write_text(f"model: {{hf: {model}}}\nlogging: {{run_dir: {run}}}\n")
    command = gspo_moe("train", "config.yaml", *SMALL_RL, "logging.progress=false")
    program = Program(command, tmp_path)
    program.wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 2,' in (run / "metrics.jsonl").read_text())
    os.kill(program.pid, signal.Signals[name])
    check_end(program, run, name)
    succeed(command, tmp_path)
    assert metrics_by_step(run) == metrics_by_step(one_process.path)
