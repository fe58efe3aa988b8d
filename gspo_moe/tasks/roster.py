"""Which worker does what and until when: decisions alone, by a clock that is given.

An item that takes too long, or takes its worker down, costs itself and nobody else: what its worker still had to do is
handed out anew, one by one, to whoever is free. Where items have hung before, a worker's replacement starts once its
item has taken half of its time. So `count` items that all hang take count / workers times `timeout_seconds`, or times
half of that and the start of a worker where this is longer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from gspo_moe.config.task import RewardConfig
from gspo_moe.tasks.protocol import Item
from gspo_moe.tasks.rewards import Step
from gspo_moe.tasks.worker import Job
from gspo_moe.types import Reward

Outcome = Reward | Step | str | TimeoutError  # the latter two say why there is none
MAX_TRIES = 3  # of starts in a row, and of workers that end before they take what they are sent


@dataclass(eq=False)
class Group:
    """Items that travel together. outcomes: by an item's number; future: of all of them in order."""

    job: Job
    items: Sequence[Item]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    future: Future[list[Outcome]] = field(default_factory=Future)

    def settle(self, number: int, outcome: Outcome) -> None:
        self.outcomes.setdefault(number, outcome)
        if len(self.outcomes) == len(self.items) and not self.future.done():
            self.future.set_result([self.outcomes[each] for each in range(len(self.items))])

    def settle_rest(self, why: Outcome) -> None:
        """Nobody waits for the others any more."""
        for number in range(len(self.items)):
            self.settle(number, why)


@dataclass(eq=False)
class Load:
    """What one worker is sent: items of a group, by number. tries: workers that ended before they took it."""

    group: Group
    numbers: Sequence[int]
    tries: int = 0
    whole: bool = False
    done: int = 0

    def left(self) -> list[Load]:
        """What is not done, one by one."""
        return [Load(self.group, (number,), self.tries) for number in self.numbers[self.done :]]

    def fail(self, why: Outcome) -> None:
        for number in self.numbers[self.done :]:
            self.group.settle(number, why)


class State(Enum):
    STARTING, IDLE, SENT, BUSY = range(4)


@dataclass
class Member:
    """A worker. since: when it came into its state, or began with its present item."""

    since: float
    state: State = State.STARTING
    load: Load | None = None


class Roster:
    """The workers of a pool and what waits for them; a worker is called by a number of its own."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.members = dict[int, Member]()
        self._queue = deque[Load]()
        self._failed_starts = self._hung = 0
        self._was_ready = False

    def add(self, group: Group) -> None:
        if not self._queue and not any(member.load for member in self.members.values()):
            self._failed_starts = self._hung = 0  # what kept workers from starting may be mended
        self._queue.append(Load(group, range(len(group.items))))

    def missing(self, now: float) -> int:
        """How many workers to start."""
        return 0 if self._failed_starts >= MAX_TRIES else max(0, self._wanted(now) - len(self.members))

    def surplus(self, now: float) -> list[int]:
        """Idle workers beyond those wanted: replacements of what came to its end after all."""
        idle = [number for number, one in self.members.items() if one.state is State.IDLE]
        return idle[: max(0, len(self.members) - self._wanted(now))]

    def _wanted(self, now: float) -> int:
        half = self._config.timeout_seconds / 2
        slow = [one for one in self.members.values() if one.state is State.BUSY and now >= one.since + half]
        return self._config.workers + (len(slow) if self._hung else 0)

    def give(self, now: float) -> Iterator[tuple[int, Load]]:
        """What to send to whom; at most `workers` work at a time."""
        working = sum(one.load is not None for one in self.members.values())
        idle = [number for number, one in self.members.items() if one.state is State.IDLE]
        wanted = (load for load in iter(self._next, None) if not load.group.future.done())
        for number, load in zip(idle[: max(0, self._config.workers - working)], wanted, strict=False):
            self.members[number] = Member(now, State.SENT, load)
            yield number, load

    def sent(self, number: int, now: float) -> None:
        """The worker has what it was given, for which others were sent theirs before it."""
        self.members[number].since = now

    def _next(self) -> Load | None:
        return self._queue.popleft() if self._queue else None

    def _deadline(self, member: Member) -> float:
        if member.state is State.IDLE:
            return math.inf
        starts = member.state is State.STARTING
        return member.since + (self._config.start_seconds if starts else self._config.timeout_seconds)

    def wait(self, now: float) -> float:
        """Seconds until something must be decided."""
        ends = [self._deadline(one) for one in self.members.values()]
        half = self._config.timeout_seconds / 2
        halves = [one.since + half for one in self.members.values() if one.state is State.BUSY and self._hung]
        return min((end - now for end in (*ends, *halves) if end > now), default=math.inf)

    def overdue(self, now: float) -> Iterator[tuple[int, Outcome]]:
        """Workers that are to be ended, and what to say of them to `lost`."""
        for number, one in list(self.members.items()):
            if self._deadline(one) > now:
                continue
            limits = self._config
            if one.state is State.BUSY:
                yield number, TimeoutError(f"within task.reward.timeout_seconds={limits.timeout_seconds:g}")
            elif one.state is State.SENT:
                yield (
                    number,
                    f"a worker did not take it within task.reward.timeout_seconds={limits.timeout_seconds:g}; raise "
                    "that, or give rewards less to read",
                )
            else:
                yield (
                    number,
                    f"no worker has made its task within task.reward.start_seconds={limits.start_seconds:g}, so that "
                    "an import or the task's constructor hangs (where, is in what it printed); mend it, or raise the "
                    "limit",
                )

    def started(self, number: int, now: float) -> None:
        self.members[number] = Member(now)

    def ready(self, number: int, now: float) -> None:
        self.members[number] = Member(now, State.IDLE)
        self._failed_starts, self._was_ready = 0, True

    def took(self, number: int, whole: bool, now: float) -> None:
        member = self.members[number]
        assert member.load is not None
        member.state, member.since, member.load.whole = State.BUSY, now, whole

    def done(self, number: int, outcomes: Sequence[Outcome], now: float) -> None:
        """The next items of its load, all of them where it was one call, or none where that raised."""
        member = self.members[number]
        load = member.load
        assert load is not None
        for outcome in outcomes:
            load.group.settle(load.numbers[load.done], outcome)
            load.done += 1
        member.since = now
        if load.done == len(load.numbers) or not outcomes:
            self._queue.extendleft(reversed(load.left()))
            self.members[number] = Member(now, State.IDLE)

    def lost(self, number: int, why: Outcome, *, again: bool = True) -> None:
        """A worker has ended. again: another may start in its place, as where one has been ready before."""
        member = self.members.pop(number)
        load = member.load
        if member.state is State.STARTING:
            self._failed_starts = self._failed_starts + 1 if again or self._was_ready else MAX_TRIES
        elif member.state is State.SENT:
            assert load is not None
            load.tries += 1
            if load.tries < MAX_TRIES:
                self._queue.appendleft(load)
            else:
                load.fail(why)
        elif member.state is State.BUSY:
            assert load is not None
            self._hung += isinstance(why, TimeoutError)
            if not load.whole:  # in one call it may be the fault of any
                load.group.settle(load.numbers[load.done], why)
                load.done += 1
            self._queue.extendleft(reversed(load.left()))
        if self._failed_starts >= MAX_TRIES and not self.members:
            self.fail(why)

    def fail(self, why: Outcome) -> None:
        """Nothing that waits will be done."""
        while self._queue:
            self._queue.popleft().fail(why)

    def unwanted(self) -> list[int]:
        """Workers at what was settled without them."""
        return [number for number, one in self.members.items() if one.load is not None and one.load.group.future.done()]
