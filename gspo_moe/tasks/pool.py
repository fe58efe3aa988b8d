"""A task's own code in worker processes: what raises, hangs, crashes or gives nonsense is an error and never fatal.

Items travel in groups, so that talking to the workers costs little. A group has one item's time limit; when it runs
over, or takes its worker down, its items are done again one by one, each with the whole limit to itself. A rubric of
the batch form gets a group in one call, and whole prompts in a group; where it raises, its items come one by one too.
Which items make a group depends on their prompts alone, so that a group can start once its last item is there, while
answers to others are still being sampled.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from pebble import ProcessPool

from gspo_moe.config.schema import TaskConfig
from gspo_moe.errors import GspoMoeError, RewardError
from gspo_moe.orphans import end_with
from gspo_moe.tasks import make_task
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


Over = Callable[[int, Conversation], None]  # takes a conversation, by the number of its prompt, once it has ended
Started = Future | BrokenProcessPool  # a group of items that workers were given, or could not be given


class Begun:
    """A batch of conversations that end one after the other, see `TaskPool.begin`.

    prompts: of all of them. started: the groups, by number, that are with the workers.
    """

    def __init__(
        self, prompts: Sequence[Prompt], groups: Sequence[list[int]], start: Callable[[list[Item]], Started]
    ) -> None:
        self.prompts, self.started = list(prompts), dict[int, Started]()
        self._groups, self._start = groups, start
        self._group_of = {index: number for number, group in enumerate(groups) for index in group}
        self._items: dict[int, Item] = {}

    def add(self, index: int, turns: Conversation) -> None:
        """The conversation with prompt `index` is over; with the last one of its group that group starts."""
        self._items[index] = self.prompts[index], turns
        number = self._group_of[index]
        if all(each in self._items for each in self._groups[number]):
            self.started[number] = self._start([self._items[each] for each in self._groups[number]])


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
        self._begun: dict[tuple[str, ...], Begun] = {}  # by the uids of their prompts
        self._lock = threading.RLock()  # servers' answers end on another thread than the one that wants rewards

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> bool:
        """Starts the workers, which are ready a second later, while the caller does something else; True if they go.

        Where the system gives no process the first batch tries again, and says so.
        """
        try:
            return bool(self._running_pool().active)
        except RuntimeError:
            self.close()
            return False

    def close(self) -> None:
        """Ends the workers, busy or not; a later batch starts new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None
            for begun in self._begun.values():
                begun.started.clear()

    def failed(self, error: str, timed_out: bool) -> Reward:
        """The reward of a conversation that got none of its own."""
        return Reward(self._reward.failure_reward, error=error, timed_out=timed_out)

    def begin(self, prompts: Sequence[Prompt]) -> Over:
        """Expects a conversation with each of these prompts, and `rewards` of all of them, in order, or `forget`.

        Those that the result is told of, on any thread, may get theirs at once, in groups that are the same as without
        it.
        """

        def start(items: list[Item]) -> Started:
            return self._schedule(self._running_pool(), give_reward, items)

        begun = Begun(prompts, self._grouped(prompts), start)
        with self._lock:
            self._begun[_uids(prompts)] = begun

        def over(index: int, turns: Conversation) -> None:
            with self._lock:
                begun.add(index, turns)

        return over

    def forget(self, prompts: Sequence[Prompt]) -> None:
        """What was begun of these prompts is wanted no more."""
        with self._lock:
            self._begun.pop(_uids(prompts), None)

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        """The rubric's reward of each conversation; `failure_reward` where it gave none."""
        prompts = [prompt for prompt, _ in items]
        begun = self._begun.get(_uids(prompts))
        outcomes = self._outcomes(give_reward, items, {} if begun is None else begun.started)
        self.forget(prompts)
        return [
            self.failed(self._error(item, found, "reward"), isinstance(found, TimeoutError))
            if not isinstance(found, Reward)
            else found
            for item, found in zip(items, outcomes, strict=True)
        ]

    def steps(self, items: Sequence[Item]) -> list[Step]:
        """What the environment says to each conversation; in one without turns, before the first answer."""
        return [
            Step(None, error=self._error(item, found, "step"), timed_out=isinstance(found, TimeoutError))
            if not isinstance(found, Step)
            else found
            for item, found in zip(items, self._outcomes(take_step, items, {}), strict=True)
        ]

    def _error(self, item: Item, found: str | BaseException, what: str) -> str:
        text = f"{type(found).__name__}: {found}" if isinstance(found, BaseException) else found
        if isinstance(found, TimeoutError):
            text = f"no {what} within task.reward.timeout_seconds={self._reward.timeout_seconds:g}"
        return f"{item[0].uid}: {text}"

    def _outcomes(
        self, job: Job[Result], items: Sequence[Item], started: Mapping[int, Started]
    ) -> list[Result | str | BaseException]:
        """Of each item the job's result, or why there is none; started: groups that are with the workers already."""
        outcomes: dict[int, Result | str | BaseException] = {}
        pending = self._grouped([prompt for prompt, _ in items])
        for round_number in range(MAX_ROUNDS):
            retry: list[list[int]] = []
            for group, result in zip(pending, self._run(job, items, pending, started), strict=True):
                pool_broke = isinstance(result, BrokenProcessPool) and round_number < MAX_ROUNDS - 1
                if isinstance(result, list):
                    outcomes.update(zip(group, result, strict=True))
                elif len(group) > 1 or pool_broke:
                    retry.extend([index] for index in group)
                else:
                    outcomes[group[0]] = result
            pending, started = retry, {}
        return [outcomes[index] for index in range(len(items))]

    def _grouped(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        size = min(MAX_GROUP, max(1, math.ceil(len(prompts) / (GROUPS_PER_WORKER * self._reward.workers))))
        groups: list[list[int]] = []
        for _, same in groupby(range(len(prompts)), key=lambda index: prompts[index].uid if self._batched else index):
            whole = list(same)
            if groups and len(groups[-1]) + len(whole) <= size:
                groups[-1] += whole
            else:
                groups.append(whole)
        return groups

    def _run(
        self, job: Job[Result], items: Sequence[Item], groups: list[list[int]], started: Mapping[int, Started]
    ) -> list[list[Result | str] | BaseException]:
        """For each group its outcomes, or what ended it."""
        if not groups:
            return []
        with self._lock:
            pool = self._running_pool()  # before `started` is read, which a broken pool's end empties
            given = [
                started[number] if number in started else self._schedule(pool, job, [items[index] for index in group])
                for number, group in enumerate(groups)
            ]
        while wait([one for one in given if isinstance(one, Future)], POLL_SECONDS).not_done and pool.active:
            pass
        lost = BrokenProcessPool("the pool broke before this item was handed to a worker")
        return [
            one if not isinstance(one, Future) else (one.exception() or one.result()) if one.done() else lost
            for one in given
        ]

    def _schedule(self, pool: ProcessPool, job: Job[Result], items: list[Item]) -> Started:
        try:
            return pool.schedule(_work, args=(self._task, job, items), timeout=self._reward.timeout_seconds)
        except RuntimeError as error:  # the pool broke while it was being filled
            return BrokenProcessPool(str(error))

    def _running_pool(self) -> ProcessPool:
        with self._lock:
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


def _uids(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.uid for prompt in prompts)


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
