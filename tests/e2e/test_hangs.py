"""A rank that is stopped, or hangs, ends the job within the limit, and is the one that is named."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from gspo_moe.errors import RankError
from tests.e2e.conftest import FinishedRun
from tests.e2e.faults import Job, ranks
from tests.e2e.program import Program, gspo_moe, succeed

# Rank 1 never comes back from the rewards of step 3; its threads live.
STUCK = """
import os, sys, time, warnings

if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        from gspo_moe import cli
        from gspo_moe.tasks.pool import TaskPool
        from gspo_moe.training import loop
    rl_step, rewards = loop.rl_step, TaskPool.rewards

    def step(trainer):
        step.number = trainer.progress.step
        return rl_step(trainer)

    def stuck_rewards(pool, items):
        if os.environ["RANK"] == "1" and getattr(step, "number", 0) == 2:
            time.sleep(3600)
        return rewards(pool, items)

    loop.rl_step, TaskPool.rewards = step, stuck_rewards
    sys.exit(cli.main(sys.argv[1:]))
"""
LIMIT = "parallel.timeout_minutes=0.3"
QUICK_END = ("--shutdown-timeout", "3")  # a stopped process takes no SIGTERM

pytestmark = pytest.mark.slow


def test_a_stopped_rank_is_named(quickstart: FinishedRun, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", quickstart)
    program = Program(job.command(LIMIT, options=QUICK_END), tmp_path)
    program.wait_for(lambda: job.has_step(2))
    stopped = ranks(program)[1].pid
    os.kill(stopped, signal.SIGSTOP)
    outcome = program.finish()
    assert (outcome.code, outcome.left_behind) == (RankError.exit_code, ())
    *_, last = outcome.stderr.splitlines()
    assert last.startswith("gspo-moe: RankError: nothing is heard any more of ranks that the others wait for")
    assert f"(stopped, or lost): rank 1: process {stopped} on {socket.gethostname()}" in last
    assert "phase " in last
    assert re.search(r" < [\w/]+\.py:\d+ ", last)  # of the project; the innermost place may have no file
    succeed(job.command(), tmp_path)
    job.check()


def test_a_rank_that_does_not_come_to_a_collective_is_named(quickstart: FinishedRun, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", quickstart)
    (tmp_path / "stuck.py").write_text(STUCK)
    program = Program(job.command(LIMIT, options=QUICK_END, script=("stuck.py",)), tmp_path)
    outcome = program.finish()
    assert (outcome.code, outcome.left_behind) == (RankError.exit_code, ())
    *_, last = outcome.stderr.splitlines()
    assert last.startswith("gspo-moe: RankError: a collective did not finish, for which the others wait: rank 1: ")
    assert "is in step 3, phase reward" in last
    assert "stuck_rewards" in last
    succeed(job.command(), tmp_path)
    job.check()


@pytest.mark.parametrize("command", ["train", "train --check", "eval", "bank", "doctor"])
def test_a_task_that_is_never_made_ends_every_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "hung.py").write_text("import time\n\n\ndef task(options, seed):\n    time.sleep(3600)\n")
    (tmp_path / "config.yaml").write_text("model: tiny\ntask: {name: 'hung:task', reward: {start_seconds: 1}}\n")
    bank = ["bank.safetensors"] if command == "bank" else []
    outcome = Program(gspo_moe(*command.split(), "config.yaml", *bank), tmp_path).finish()
    assert (outcome.code, outcome.left_behind) == (2, ())
    assert outcome.stderr.count("task.name=hung:task: the task is not made after task.reward.start_seconds=1") == 1
    assert "in task\n    time.sleep(3600)\n" in outcome.stderr
