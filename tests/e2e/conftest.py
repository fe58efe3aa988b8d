"""Runs that several tests look at, made once for all of pytest-xdist's processes."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
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


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], FinishedRun]) -> FinishedRun:
    """What the first process to ask makes in a folder of that name; the others wait for it."""
    own = factory.getbasetemp()
    every = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, kept = every / name, every / f"{name}.pickle"
    with (every / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            folder.mkdir()  # fails where the first to ask did
            kept.write_bytes(pickle.dumps(make(folder)))
    found: FinishedRun = pickle.loads(kept.read_bytes())
    return found


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """launch/quickstart.sh, both stages, on two processes."""

    def make(folder: Path) -> FinishedRun:
        cold_start = (*SMALL_MODEL, *TASK, "schedule.steps=60", "optimizer.lr=1e-2")
        command: list[str | Path] = ["bash", ROOT / "launch" / "quickstart.sh", *SMALL_RL]
        outcome = succeed(command, folder, RUN_DIR=str(folder / "run"), COLD_START=" ".join(cold_start))
        return FinishedRun(folder / "run", command, outcome)

    return once(tmp_path_factory, "quickstart", make)


@pytest.fixture(scope="session")
def one_process(quickstart: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A plain start from the quickstart's cold start, in another folder, which is gone by now."""

    def make(folder: Path) -> FinishedRun:
        shutil.copytree(quickstart.path / "cold_start" / "hf", folder / "model")
        (folder / "config.yaml").write_text("model: {hf: model}\nlogging: {run_dir: run}\n")
        command = gspo_moe("train", "config.yaml", *SMALL_RL)
        return FinishedRun(folder / "run", command, succeed(command, folder))

    return once(tmp_path_factory, "one_process", make)
