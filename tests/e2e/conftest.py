"""Runs that several tests look at."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.program import ROOT, SMALL_MODEL, SMALL_RL, TASK, Outcome, gspo_moe, succeed


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, the command that made it, and how that ended."""

    path: Path
    command: list[str | Path]
    outcome: Outcome


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """launch/quickstart.sh, both stages, on two processes."""
    folder = tmp_path_factory.mktemp("quickstart")
    cold_start = (*SMALL_MODEL, *TASK, "schedule.steps=60", "optimizer.lr=1e-2")
    command: list[str | Path] = ["bash", ROOT / "launch" / "quickstart.sh", *SMALL_RL]
    outcome = succeed(command, folder, RUN_DIR=str(folder / "run"), COLD_START=" ".join(cold_start))
    return FinishedRun(folder / "run", command, outcome)


@pytest.fixture(scope="session")
def one_process(quickstart: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A plain start from the quickstart's cold start, in another folder, which is gone by now."""
    folder = tmp_path_factory.mktemp("one_process")
    shutil.copytree(quickstart.path / "cold_start" / "hf", folder / "model")
    (folder / "config.yaml").write_text("model: {hf: model}\nlogging: {run_dir: run}\n")
    command = gspo_moe("train", "config.yaml", *SMALL_RL)
    return FinishedRun(folder / "run", command, succeed(command, folder))
