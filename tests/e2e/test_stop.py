"""A signal to a run of several processes: the last whole step is saved, one line says so, the run can go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.e2e.conftest import FinishedRun
from tests.e2e.program import ROOT, SMALL_RL, Program, metrics_by_step, succeed


def test_a_signal_loses_no_whole_step(quickstart: FinishedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = f"model.hf={quickstart.path / 'cold_start' / 'hf'}"
    config = ROOT / "examples" / "quickstart.yaml"
    launcher: list[str | Path] = ["bash", ROOT / "launch" / "torchrun.sh", "--nproc-per-node", "2", "--"]
    command = [*launcher, "train", config, model, f"logging.run_dir={run}", *SMALL_RL, "checkpoint.interval=0"]
    command += ["logging.progress=false"]
    program = Program(command, tmp_path)
    metrics = run / "metrics.jsonl"
    program.wait_for(lambda: metrics.exists() and '"step": 3' in metrics.read_text())
    os.kill(program.pid, signal.SIGUSR1)
    outcome = program.finish()
    assert (outcome.code, outcome.left_behind) == (128 + signal.SIGUSR1, ())
    *_, first, last = outcome.stderr.splitlines()
    assert first == "gspo-moe: SIGUSR1: the last whole step is saved, then it ends; a second signal ends it at once"
    (saved,) = (run / "checkpoints").iterdir()
    told = f"ended by SIGUSR1. {saved} holds its last whole step; the same command goes on from there"
    assert last == f"gspo-moe: Interrupted: {told}"
    succeed(command, tmp_path)
    assert metrics_by_step(run) == metrics_by_step(quickstart.path)
