"""A task's own code in worker processes: what raises, hangs, crashes or gives nonsense is an error and never fatal.

Items travel in groups, so that talking to the workers costs little. A group has one item's time limit; when it runs
over, or takes its worker down, its items are done again one by one, each with the whole limit to itself. A rubric of
the batch form gets a group in one call, and whole prompts in a group; where it raises, its items come one by one too.
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
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from pebble import ProcessPool

from gspo_moe.config.schema import TaskConfig
from gspo_moe.errors import GspoMoeError, RewardError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.orphans import end_with
from gspo_moe.tasks.protocol import Item, Task
from gspo_moe.tasks.rewards import Step, give_reward, give_rewards, is_batched, prepare, take_step
from gspo_moe.types import Conversation, Prompt, Reward

GROUPS_PER_WORKER = 4
MAX_GROUP = 64
MAX_ROUNDS = 3
OURS = str(Path(__file__).parent)
POLL_SECONDS = 1.0  # a pool that breaks leaves what it had not handed out yet waiting for ever

MakeTask = Callable[[TaskConfig, int], Task]
Result = TypeVar("Result", Reward, Step)
Job = Callable[[Task, Prompt, Conversation], Result | str]  # which a worker imports by name; a text is an error


class TaskPool:
    """Runs rubrics and environments in `config.reward.workers` processes, which start with the first batch, or before.

    Workers are spawned: forking a process that has torch and gloo threads can deadlock. `make` builds the task in each
    worker and must be importable there; spawning also imports the program's main module, so keep that one light.
    """

    def __init__(self, config: TaskConfig, seed: int, make: MakeTask = make_task, batched: bool = False) -> None:
        """batched: keeps the conversations of one prompt in one group, for a rubric of the batch form."""
        self._reward, self._batched = config.reward, batched
        self._task = (make, pickle.dumps(config), seed)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> bool:
        """Starts the workers, which are ready a second later, while the caller does something else; True if they go."""
        return bool(self._running_pool().active)

    def close(self) -> None:
        """Ends the workers, busy or not; a later batch starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def failed(self, error: str, timed_out: bool) -> Reward:
        """The reward of a conversation that got none of its own."""
        return Reward(self._reward.failure_reward, error=error, timed_out=timed_out)

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        """The rubric's reward of each conversation; `failure_reward` where it gave none."""
        return [
            self.failed(self._error(item, found, "reward"), isinstance(found, TimeoutError))
            if not isinstance(found, Reward)
            else found
            for item, found in zip(items, self._outcomes(give_reward, items), strict=True)
        ]

    def steps(self, items: Sequence[Item]) -> list[Step]:
        """What the environment says to each conversation; in one without turns, before the first answer."""
        return [
            Step(None, error=self._error(item, found, "step"), timed_out=isinstance(found, TimeoutError))
            if not isinstance(found, Step)
            else found
            for item, found in zip(items, self._outcomes(take_step, items), strict=True)
        ]

    def _error(self, item: Item, found: str | BaseException, what: str) -> str:
        text = f"{type(found).__name__}: {found}" if isinstance(found, BaseException) else found
        if isinstance(found, TimeoutError):
            text = f"no {what} within task.reward.timeout_seconds={self._reward.timeout_seconds:g}"
        return f"{item[0].uid}: {text}"

    def _outcomes(self, job: Job[Result], items: Sequence[Item]) -> list[Result | str | BaseException]:
        """Of each item the job's result, or why there is none."""
        outcomes: dict[int, Result | str | BaseException] = {}
        pending = self._grouped(items)
        for round_number in range(MAX_ROUNDS):
            retry: list[list[int]] = []
            for group, result in zip(pending, self._run(job, items, pending), strict=True):
                pool_broke = isinstance(result, BrokenProcessPool) and round_number < MAX_ROUNDS - 1
                if isinstance(result, list):
                    outcomes.update(zip(group, result, strict=True))
                elif len(group) > 1 or pool_broke:
                    retry.extend([index] for index in group)
                else:
                    outcomes[group[0]] = result
            pending = retry
        return [outcomes[index] for index in range(len(items))]

    def _grouped(self, items: Sequence[Item]) -> list[list[int]]:
        size = min(MAX_GROUP, max(1, math.ceil(len(items) / (GROUPS_PER_WORKER * self._reward.workers))))
        groups: list[list[int]] = []
        for _, same in groupby(range(len(items)), key=lambda index: items[index][0].uid if self._batched else index):
            whole = list(same)
            if groups and len(groups[-1]) + len(whole) <= size:
                groups[-1] += whole
            else:
                groups.append(whole)
        return groups

    def _run(
        self, job: Job[Result], items: Sequence[Item], groups: list[list[int]]
    ) -> list[list[Result | str] | BaseException]:
        """For each group its outcomes, or what ended it."""
        if not groups:
            return []
        limit = self._reward.timeout_seconds
        pool = self._running_pool()
        try:
            futures = [
                pool.schedule(_work, args=(self._task, job, [items[index] for index in group]), timeout=limit)
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


def _start_worker(trainer: int, make: MakeTask, config: bytes, seed: int) -> None:
    end_with(trainer)
    # At a signal to its group, or to a whole job, the trainer finishes its step, and needs its workers.
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    prepare(_worker_task(make, config, seed).rubric)


@functools.cache
def _worker_task(make: MakeTask, config: bytes, seed: int) -> Task:
    """The worker's task: built when the worker starts, outside any item's time limit, and kept."""
    return make(pickle.loads(config), seed)


def _work(task: tuple[MakeTask, bytes, int], job: Job[Result], items: Sequence[Item]) -> list[Result | str]:
    made = _worker_task(*task)
    if job is give_reward and len(items) > 1 and is_batched(made.rubric):
        try:
            return give_rewards(made.rubric, items)  # type: ignore[return-value]  # of that job
        except RewardError as error:  # no item's fault, so that each alone would hide it
            return [f"{type(error).__name__}: {error}"] * len(items)
    return [_work_on_one(made, job, *item) for item in items]


def _work_on_one(task: Task, job: Job[Result], prompt: Prompt, turns: Conversation) -> Result | str:
    try:
        return job(task, prompt, turns)
    except GspoMoeError as error:  # says all there is to say
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # a task may be any code, and none of its errors may end the run
        trace = error.__traceback__
        while trace and trace.tb_next and trace.tb_frame.f_code.co_filename.startswith(OURS):
            trace = trace.tb_next
        return "".join(traceback.format_exception(type(error), error, trace)).strip()
