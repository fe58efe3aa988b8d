"""SIGKILL at random moments, of all, of one rank, of the launcher, also while saving: the run goes on, bit for bit."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import FinishedRun
from tests.e2e.faults import Job, kill, nothing_goes_on, ranks
from tests.e2e.program import Program, succeed

KINDS = ("all", "rank", "launcher")
MOMENTS = ("any", "saving", "pruning")
RUNS, KILLS_A_RUN = 10, 5
# From a start on: of its whole life, and around a moment that is waited for.
LIFE_SECONDS, AROUND_SECONDS = 14.0, 0.08


def reach(moment: str, program: Program, job: Job, draw: random.Random) -> None:
    """Waits for a random moment of that kind; an ended program is none."""
    checkpoints = job.run / "checkpoints"
    if moment == "any":
        time.sleep(draw.uniform(0.0, LIFE_SECONDS))
        return
    pattern = "*.partial" if moment == "saving" else "step_????????"
    before = set(checkpoints.glob("step_????????"))
    program.wait_for(lambda: bool(set(checkpoints.glob(pattern)) - before))  # a new one, whose old one goes next
    time.sleep(draw.uniform(0.0, AROUND_SECONDS))


def shoot(kind: str, program: Program, draw: random.Random) -> None:
    if program.ended:
        raise RuntimeError("ended too early")
    if kind == "all":
        for process in program.processes():
            process.kill()
        return
    targets = [program.pid] if kind == "launcher" else [one.pid for one in ranks(program)] or [program.pid]
    kill(draw.choice(targets))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_kills_at_random_moments(seed: int, quickstart: FinishedRun, tmp_path: Path) -> None:
    draw, job = random.Random(seed), Job(tmp_path / "run", quickstart)
    done = Counter[str]()
    while done.total() < KILLS_A_RUN:
        kind, moment = draw.choice(KINDS), draw.choice(MOMENTS)
        program = Program(job.command(), tmp_path)
        try:
            reach(moment, program, job, draw)
            shoot(kind, program, draw)
        except (RuntimeError, psutil.NoSuchProcess):  # it had finished: the next one starts anew from an earlier step
            program.kill()
            job.check()
            forget(job)
            continue
        print(f"seed {seed}: {kind}, {moment}")
        nothing_goes_on(program, job.run)
        program.kill()
        done[f"{kind}, {moment}"] += 1
    succeed(job.command(), tmp_path)
    job.check()
    print(f"seed {seed}: {dict(sorted(done.items()))}")


@pytest.mark.slow
def test_the_launcher_starts_the_ranks_anew(quickstart: FinishedRun, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", quickstart)
    program = Program(job.command(options=("--max-restarts", "2")), tmp_path)
    for step in (2, 4):
        program.wait_for(lambda step=step: job.has_step(step))  # type: ignore[misc]
        kill(ranks(program)[1].pid)
    outcome = program.finish()
    assert (outcome.code, outcome.left_behind) == (0, ())
    assert outcome.stderr.count("continuing from step ") == 2
    job.check()


def forget(job: Job) -> None:
    """Makes room for more kills: the run begins once more."""
    job.run.rename(job.run.with_name(f"finished_{time.monotonic_ns()}"))
