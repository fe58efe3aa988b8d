"""A task's own code in worker processes: what raises, hangs, crashes or gives nonsense is an error and never fatal.

Items travel in groups, so that talking to the workers costs little; each has the time limit to itself, and one that
runs over it, or takes its worker down, costs no other (`tasks.roster`). A rubric of the batch form gets a group in one
call, which has that limit, and whole prompts in a group; where it raises, its items come one by one. Which items make a
group depends on their prompts alone, so that a group can start once its last item is there, while answers to others are
still being sampled.
"""

from __future__ import annotations

import math
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from itertools import groupby

from gspo_moe.config.schema import TaskConfig
from gspo_moe.tasks import make_task
from gspo_moe.tasks.protocol import Item
from gspo_moe.tasks.rewards import Step, give_reward, take_step
from gspo_moe.tasks.roster import Group, Outcome
from gspo_moe.tasks.worker import Job, MakeTask, Start
from gspo_moe.tasks.workers import Workers
from gspo_moe.types import Conversation, Prompt, Reward

GROUPS_PER_WORKER = 4
MAX_GROUP = 64

Over = Callable[[int, Conversation], None]  # takes a conversation, by the number of its prompt, once it has ended


class Begun:
    """A batch of conversations that end one after the other, see `TaskPool.begin`.

    prompts: of all of them. started: the groups, by number, that are with the workers.
    """

    def __init__(
        self, prompts: Sequence[Prompt], groups: Sequence[list[int]], start: Callable[[list[Item]], Group]
    ) -> None:
        self.prompts, self.started = list(prompts), dict[int, Group]()
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
        self._start = Start(os.getpid(), make, pickle.dumps(config), seed)
        self._workers: Workers | None = None
        self._begun: dict[tuple[str, ...], Begun] = {}  # by the uids of their prompts
        self._lock = threading.RLock()  # servers' answers end on another thread than the one that wants rewards

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the workers, which are ready a second later, while the caller does something else."""
        self._running()

    def close(self) -> None:
        """Ends the workers, busy or not; a later batch starts new ones."""
        with self._lock:
            if self._workers is not None:
                self._workers.stop()
                self._workers = None
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

        def start(items: list[Item]) -> Group:
            return self._running().submit(give_reward, items)

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

    def _error(self, item: Item, found: Outcome, what: str) -> str:
        return f"{item[0].uid}: no {what} {found}" if isinstance(found, TimeoutError) else f"{item[0].uid}: {found}"

    def _outcomes(self, job: Job, items: Sequence[Item], started: Mapping[int, Group]) -> list[Outcome]:
        """Of each item what came of it; started: groups that are with the workers already."""
        if not items:
            return []
        groups = self._grouped([prompt for prompt, _ in items])
        with self._lock:
            workers = self._running()  # before `started` is read, which the end of workers empties
            given = [
                started.get(number) or workers.submit(job, [items[index] for index in group])
                for number, group in enumerate(groups)
            ]
        limit = self._reward.batch_seconds
        if wait([one.future for one in given], limit).not_done:
            workers.abandon(given, TimeoutError(f"within task.reward.batch_seconds={limit:g}, of all {len(items)}"))
        workers.show_rest()
        outcomes: dict[int, Outcome] = {}
        for group, one in zip(groups, given, strict=True):
            outcomes.update(zip(group, one.future.result(), strict=True))
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

    def _running(self) -> Workers:
        with self._lock:
            if self._workers is not None and not self._workers.running:
                self.close()
            if self._workers is None:
                self._workers = Workers(self._reward, self._start)
            return self._workers


def _uids(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.uid for prompt in prompts)
