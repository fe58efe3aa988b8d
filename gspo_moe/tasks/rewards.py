"""Rewards in worker processes: one that raises, hangs, crashes or gives nonsense is counted and never fatal.

Items travel in groups, so that talking to the workers costs little. A group has one item's time limit; when it runs
over, or takes its worker down, its items are scored again one by one, each with the whole limit to itself.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from numbers import Real

from pebble import ProcessPool

from gspo_moe.config.task import TaskConfig
from gspo_moe.tasks import make_task
from gspo_moe.tasks.orphans import end_with
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Prompt

GROUPS_PER_WORKER = 4
MAX_GROUP = 64
MAX_ROUNDS = 3
LARGEST_REWARD = 1e6  # beyond it squares and sums of rewards leave float32, and advantages their precision
POLL_SECONDS = 1.0  # a pool that breaks leaves what it had not handed out yet waiting for ever

MakeTask = Callable[[TaskConfig, int], Task]
Item = tuple[Prompt, str]
Outcome = float | str  # a reward, or why there is none


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of one batch, in its order.

    failures: items whose score raised, killed its worker or was no number of at most `LARGEST_REWARD` in size.
    timeouts: items over the time limit. Both kinds have the configured failure reward.
    first_error: what went wrong with the first of them, with the reward's stack trace where it raised.
    """

    rewards: tuple[float, ...]
    failures: int
    timeouts: int
    first_error: str | None


class RewardPool:
    """Scores answers in `config.reward.workers` processes, which start with the first batch.

    Workers are spawned: forking a process that has torch and gloo threads can deadlock. `make` builds the task in each
    worker and must be importable there; spawning also imports the program's main module, so keep that one light.
    """

    def __init__(self, config: TaskConfig, seed: int, make: MakeTask = make_task) -> None:
        self._reward = config.reward
        self._task = (make, pickle.dumps(config), seed)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, busy or not; a later batch starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def score(self, items: Sequence[Item]) -> RewardBatch:
        """The reward of each (prompt, answer)."""
        outcomes: dict[int, Outcome | BaseException] = {}
        pending = self._grouped(len(items))
        for round_number in range(MAX_ROUNDS):
            retry: list[list[int]] = []
            for group, result in zip(pending, self._run(items, pending), strict=True):
                pool_broke = isinstance(result, BrokenProcessPool) and round_number < MAX_ROUNDS - 1
                if isinstance(result, list):
                    outcomes.update(zip(group, result, strict=True))
                elif len(group) > 1 or pool_broke:
                    retry.extend([index] for index in group)
                else:
                    outcomes[group[0]] = result
            pending = retry
        return self._batch(items, outcomes)

    def _grouped(self, count: int) -> list[list[int]]:
        size = min(MAX_GROUP, max(1, math.ceil(count / (GROUPS_PER_WORKER * self._reward.workers))))
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]

    def _run(self, items: Sequence[Item], groups: list[list[int]]) -> list[list[Outcome] | BaseException]:
        """For each group its outcomes, or what ended it."""
        if not groups:
            return []
        limit = self._reward.timeout_seconds
        pool = self._running_pool()
        try:
            futures = [
                pool.schedule(_score_group, args=(self._task, [items[index] for index in group]), timeout=limit)
                for group in groups
            ]
        except RuntimeError as error:  # the pool broke while it was being filled
            return [BrokenProcessPool(str(error))] * len(groups)
        while wait(futures, timeout=POLL_SECONDS).not_done and pool.active:
            pass
        lost = BrokenProcessPool("the pool broke before this item was handed to a worker")
        return [(future.exception() or future.result()) if future.done() else lost for future in futures]

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:  # a worker that is killed while idle breaks the pool
            self.close()
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._reward.workers,
                initializer=_start_worker,
                initargs=(os.getpid(), *self._task),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool

    def _batch(self, items: Sequence[Item], outcomes: dict[int, Outcome | BaseException]) -> RewardBatch:
        rewards, failures, timeouts, first_error = [], 0, 0, None
        for index, (prompt, _) in enumerate(items):
            outcome = outcomes[index]
            if isinstance(outcome, float):
                rewards.append(outcome)
                continue
            rewards.append(self._reward.failure_reward)
            timed_out = isinstance(outcome, TimeoutError)
            timeouts += timed_out
            failures += not timed_out
            if first_error is None:
                limit = f"no reward within task.reward.timeout_seconds={self._reward.timeout_seconds:g}"
                first_error = f"{prompt.uid}: {limit if timed_out else _text(outcome)}"
        return RewardBatch(tuple(rewards), failures, timeouts, first_error)


def _start_worker(trainer: int, make: MakeTask, config: bytes, seed: int) -> None:
    end_with(trainer)
    # At a signal to its group, or to a whole job, the trainer finishes its step, and needs its rewards.
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _worker_task(make, config, seed)


@functools.cache
def _worker_task(make: MakeTask, config: bytes, seed: int) -> Task:
    """The worker's task: built when the worker starts, outside any item's time limit, and kept."""
    return make(pickle.loads(config), seed)


def _score_group(task: tuple[MakeTask, bytes, int], items: Sequence[Item]) -> list[Outcome]:
    return [_score_one(_worker_task(*task), prompt, answer) for prompt, answer in items]


def _score_one(task: Task, prompt: Prompt, answer: str) -> Outcome:
    try:
        value = task.score(prompt, answer)
        if isinstance(value, Real) and abs(value) <= LARGEST_REWARD:
            return float(value)
        return f"score gave {value!r}, which is no number from {-LARGEST_REWARD:.0f} to {LARGEST_REWARD:.0f}"
    except Exception as error:  # a reward may be any code, and none of its errors may end the run
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without this function
        return "".join(traceback.format_exception(type(error), error, trace)).strip()


def _text(outcome: Outcome | BaseException) -> str:
    return f"{type(outcome).__name__}: {outcome}" if isinstance(outcome, BaseException) else str(outcome)
