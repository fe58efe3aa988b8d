from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.tasks import make_task
from gspo_moe.tasks.rewards import RewardPool
from gspo_moe.types import Prompt

LIMIT = 1.0
PROMPT = Prompt(uid="train/0", text="", task="trouble")
TROUBLE: dict[str, Any] = {
    "none": None,
    "text": "1.0",
    "nan": float("nan"),
    "infinite": float("-inf"),
    "complex": 1j,
    "huge": 10**400,
    "large": 1.1e6,
    "largest": -1e6,
    "negative": -2,
    "true": True,
}

# Two workers, one of which is busy when their trainer goes.
KILLED = """
import multiprocessing, os, signal, threading, time
from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.tasks.rewards import RewardPool
from tests.unit.tasks.test_rewards import answers, make_trouble

if __name__ == "__main__":
    pool = RewardPool(TaskConfig(reward=RewardConfig(workers=2, timeout_seconds=600)), seed=1, make=make_trouble)
    assert pool.score(answers("1", "2")).failures == 0
    threading.Thread(target=pool.score, args=(answers("hang"),), daemon=True).start()
    time.sleep(0.5)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


class Trouble:
    """Does what the answer says, in the worker; a number is its own reward."""

    name = "trouble"

    def prompt(self, split: str, index: int) -> Prompt:
        return PROMPT

    def demonstration(self, prompt: Prompt) -> str:
        return "1"

    def score(self, prompt: Prompt, answer: str) -> float:
        if answer == "hang":
            time.sleep(3600)
        if answer == "crash":
            os._exit(3)
        if answer == "exit":
            sys.exit(0)
        if answer == "raise":
            raise ValueError("no such luck")
        if answer == "torch":
            return float("torch" in sys.modules)
        return TROUBLE[answer] if answer in TROUBLE else float(answer)


def make_trouble(config: TaskConfig, seed: int) -> Trouble:
    return Trouble()


def make_nothing(config: TaskConfig, seed: int) -> Trouble:
    raise RuntimeError("this worker cannot start")


@pytest.fixture(scope="module")
def bystanders() -> set[int | None]:
    """Child processes that are not the pool's: checkpoints leave a server behind."""
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def pool(bystanders: set[int | None]) -> Iterator[RewardPool]:
    reward = RewardConfig(workers=2, timeout_seconds=LIMIT, failure_reward=-1.0)
    with RewardPool(TaskConfig(name="trouble", reward=reward), seed=1, make=make_trouble) as pool:
        yield pool


def answers(*texts: str) -> list[tuple[Prompt, str]]:
    return [(Prompt(uid=f"train/{number}", text="", task="trouble"), text) for number, text in enumerate(texts)]


def test_rewards_come_in_order_of_the_items(pool: RewardPool) -> None:
    batch = pool.score(answers(*(str(number / 7) for number in range(300))))
    assert batch.rewards == tuple(number / 7 for number in range(300))
    assert (batch.failures, batch.timeouts, batch.first_error) == (0, 0, None)


def test_an_empty_batch_is_empty(pool: RewardPool) -> None:
    assert pool.score([]).rewards == ()


def test_each_kind_of_nonsense_is_counted_and_its_neighbours_keep_their_rewards(pool: RewardPool) -> None:
    batch = pool.score(answers("0.5", "raise", *TROUBLE))
    assert batch.rewards == (0.5, *(-1.0,) * 8, -1e6, -2.0, 1.0)
    assert (batch.failures, batch.timeouts) == (8, 0)
    error = str(batch.first_error)
    assert error.startswith("train/1: Traceback (most recent call last):\n")
    assert error.count('  File "') == 1
    assert error.endswith('raise ValueError("no such luck")\nValueError: no such luck')


def test_a_reward_beyond_the_largest_says_so(pool: RewardPool) -> None:
    assert "1100000.0, which is no number from -1000000 to 1000000" in str(pool.score(answers("large")).first_error)


def test_no_worker_outlives_a_trainer_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(KILLED)
    trainer = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert trainer.returncode == -signal.SIGKILL
    workers = [psutil.Process(int(pid)) for pid in trainer.stdout.split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_signals_to_the_trainers_group_spare_its_workers(pool: RewardPool, bystanders: set[int | None]) -> None:
    def running() -> list[int]:
        children = {process.pid for process in multiprocessing.active_children()}
        return sorted(pid for pid in children - bystanders if pid is not None)

    assert pool.score(answers("1", "2")).failures == 0
    workers = running()
    for worker in workers:
        assert os.getsid(worker) == worker
        os.kill(worker, signal.SIGUSR1)
    assert pool.score(answers("1", "2")).failures == 0
    assert running() == workers


def test_hangs_and_crashes_spare_the_rest_of_their_group(pool: RewardPool) -> None:
    texts = [str(number) for number in range(40)]
    texts[2], texts[20], texts[21], texts[33] = "hang", "crash", "exit", "raise"
    batch = pool.score(answers(*texts))
    expected = [float(number) for number in range(40)]
    for number in (2, 20, 21, 33):
        expected[number] = -1.0
    assert batch.rewards == tuple(expected)
    assert (batch.failures, batch.timeouts) == (3, 1)
    assert batch.first_error == "train/2: no reward within task.reward.timeout_seconds=1"


def test_a_crash_says_how_the_worker_ended(pool: RewardPool) -> None:
    assert "ProcessExpired" in str(pool.score(answers("crash")).first_error)


def test_workers_do_not_import_torch(pool: RewardPool) -> None:
    assert pool.score(answers("torch")).rewards == (0.0,)


@pytest.mark.parametrize("seconds_to_notice", [0.0, 0.5])
def test_the_pool_survives_workers_killed_while_idle(
    pool: RewardPool, bystanders: set[int | None], seconds_to_notice: float
) -> None:
    assert pool.score(answers("1")).rewards == (1.0,)
    for worker in multiprocessing.active_children():
        if worker.pid not in bystanders:
            worker.kill()
    time.sleep(seconds_to_notice)
    batch = pool.score(answers("0.25", "0.5"))
    assert (batch.rewards, batch.failures) == ((0.25, 0.5), 0)


def test_closing_ends_busy_workers_and_a_later_batch_starts_new_ones() -> None:
    reward = RewardConfig(timeout_seconds=LIMIT)
    pool = RewardPool(TaskConfig(reward=reward), seed=1, make=make_trouble)
    before = {process.pid for process in multiprocessing.active_children()}
    assert pool.score(answers("1")).rewards == (1.0,)
    pool.close()
    pool.close()
    assert {process.pid for process in multiprocessing.active_children()} == before
    assert pool.score(answers("1")).rewards == (1.0,)
    pool.close()


def test_workers_that_cannot_start_fail_their_items_and_end() -> None:
    more_than_a_pipe_holds = "1" * 100_000
    with RewardPool(TaskConfig(), seed=1, make=make_nothing) as pool:
        batch = pool.score(answers(*[more_than_a_pipe_holds] * 3))
    assert (batch.rewards, batch.failures) == ((0.0,) * 3, 3)
    assert "BrokenProcessPool" in str(batch.first_error)


def test_real_tasks_are_scored_and_a_runaway_expression_is_cut_off() -> None:
    config = TaskConfig(name="reasoning_gym/countdown", reward=RewardConfig(timeout_seconds=LIMIT))
    task = make_task(config, seed=4)
    prompts = [task.prompt("train", index) for index in range(2)]
    items = [(prompt, task.demonstration(prompt)) for prompt in prompts] + [(prompts[0], "9**9**9**9")]
    with RewardPool(config, seed=4) as pool:
        batch = pool.score(items)
    assert (batch.rewards, batch.failures, batch.timeouts) == ((1.0, 1.0, 0.0), 0, 1)
