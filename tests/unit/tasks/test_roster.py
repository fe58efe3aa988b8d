"""The roster by a clock of the test's own: workers that take so long to start, items that take so long or hang."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from gspo_moe.config.task import RewardConfig
from gspo_moe.tasks.roster import Group, Outcome, Roster, State
from gspo_moe.types import Reward

HANGS = math.inf


def groups_of(seconds: Sequence[float], size: int) -> list[Group]:
    """Items that take so long, `size` in a group; an item is its seconds."""
    job: Any = None
    items: list[Any] = list(seconds)
    return [Group(job, items[start : start + size]) for start in range(0, len(items), size)]


class Simulated:
    """Workers of a roster. start_seconds: until one is ready. working, alive: the most of them at a time."""

    def __init__(self, config: RewardConfig, start_seconds: float, whole: bool = False) -> None:
        self.config, self.roster, self.start_seconds, self.whole = config, Roster(config), start_seconds, whole
        self.now, self.count, self.alive, self.working, self.starts = 0.0, 0, 0, 0, 0
        self.events: dict[int, tuple[float, str]] = {}  # of each worker the next thing that it says, and when

    def run(self, groups: Sequence[Group]) -> list[Outcome]:
        """Until nobody waits for any of them."""
        for group in groups:
            self.roster.add(group)
        while not all(group.future.done() for group in groups):
            self._decide()
            if all(group.future.done() for group in groups):
                break
            following = min((when for when, _ in self.events.values()), default=math.inf)
            self.now = min(following, self.now + self.roster.wait(self.now))
            assert self.now < math.inf, "nothing would ever happen"
            for number, (when, said) in list(self.events.items()):
                if when <= self.now:
                    self._hear(number, said)
        return [outcome for group in groups for outcome in group.future.result()]

    def _decide(self) -> None:
        for number, why in list(self.roster.overdue(self.now)):
            del self.events[number]
            self.roster.lost(number, why, again=False)
        for number in self.roster.surplus(self.now):
            del self.events[number]
            self.roster.lost(number, "not wanted")
        for _ in range(self.roster.missing(self.now)):
            self.roster.started(self.count, self.now)
            self.events[self.count] = (self.now + self.start_seconds, "ready")
            self.count += 1
        for number, _ in list(self.roster.give(self.now)):
            self.roster.took(number, self.whole and len(self._numbers(number)) > 1, self.now)
            self._begin(number)
        members = self.roster.members.values()
        self.alive = max(self.alive, len(members))
        self.working = max(self.working, sum(one.state is State.BUSY for one in members))

    def _numbers(self, number: int) -> Sequence[int]:
        load = self.roster.members[number].load
        assert load is not None
        return load.numbers

    def _begin(self, number: int) -> None:
        load = self.roster.members[number].load
        assert load is not None
        items: Any = [load.group.items[each] for each in load.numbers[load.done :]]
        self.events[number] = (self.now + (sum(items) if load.whole else items[0]), "done")

    def _hear(self, number: int, said: str) -> None:
        if said == "ready":
            self.roster.ready(number, self.now)
            self.events[number] = (HANGS, "")
            return
        member = self.roster.members[number]
        assert member.load is not None
        count = len(member.load.numbers) if member.load.whole else 1
        self.roster.done(number, [Reward(self.now)] * count, self.now)
        if self.roster.members[number].load is None:
            self.events[number] = (HANGS, "")
        else:
            self._begin(number)


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("start", [0.5, 1.0, 4.0])
def test_rewards_that_all_hang_take_their_number_times_the_limit_over_the_workers(workers: int, start: float) -> None:
    limit = 2.0
    simulated = Simulated(RewardConfig(workers=workers, timeout_seconds=limit), start)
    found = simulated.run(groups_of([HANGS] * 32, size=max(1, 8 // workers)))
    assert all(isinstance(one, TimeoutError) for one in found)
    each = max(limit, limit / 2 + start)  # a replacement starts at half of the limit, but for the first ones
    assert simulated.now <= 2 * start + 32 / workers * each + 1e-9
    assert simulated.now >= 32 / workers * limit
    assert simulated.working == workers
    assert simulated.alive <= 2 * workers


def test_one_that_hangs_costs_its_worker_the_limit_and_no_other_item_anything() -> None:
    simulated = Simulated(RewardConfig(workers=2, timeout_seconds=10.0), start_seconds=1.0)
    seconds = [0.1] * 40
    seconds[2] = HANGS
    found = simulated.run(groups_of(seconds, size=5))
    assert [number for number, one in enumerate(found) if not isinstance(one, Reward)] == [2]
    assert simulated.now == pytest.approx(1.0 + 0.2 + 10.0 + 0.2), "the two behind it wait for its end"
    assert simulated.count == 3


def test_where_nothing_has_hung_slow_rewards_start_no_other_workers() -> None:
    simulated = Simulated(RewardConfig(workers=2, timeout_seconds=10.0), start_seconds=1.0)
    assert all(isinstance(one, Reward) for one in simulated.run(groups_of([9.0] * 8, size=2)))
    assert (simulated.count, simulated.now) == (2, pytest.approx(37.0))


def test_replacements_of_what_came_to_its_end_after_all_are_ended_and_a_later_batch_starts_none() -> None:
    simulated = Simulated(RewardConfig(workers=1, timeout_seconds=10.0), start_seconds=1.0)
    found = simulated.run(groups_of([HANGS, 7.0, 0.1], size=1))
    assert [isinstance(one, Reward) for one in found] == [False, True, True]
    assert (simulated.count, len(simulated.roster.members)) == (3, 1), "one started as the second took half of its time"
    simulated.run(groups_of([7.0, 0.1], size=1))
    assert simulated.count == 3


def test_a_failed_start_is_final_only_where_no_worker_has_been_ready() -> None:
    roster, (group,) = Roster(RewardConfig(workers=2)), groups_of([1.0, 1.0], size=2)
    roster.add(group)
    for number in range(2):
        roster.started(number, 0.0)
    roster.ready(0, 0.0)
    for number in range(1, 4):
        assert roster.missing(0.0) == (number > 1)
        roster.started(number, 0.0)
        roster.lost(number, "its task raised", again=False)
    assert (roster.missing(0.0), group.future.done()) == (0, False), "the one that is ready goes on"
    roster.lost(0, "its worker is gone")
    assert group.future.result() == ["its worker is gone"] * 2


def test_a_call_for_all_of_a_group_has_the_limit_and_then_each_of_its_own() -> None:
    simulated = Simulated(RewardConfig(workers=1, timeout_seconds=2.0), start_seconds=0.5, whole=True)
    found = simulated.run(groups_of([0.1, HANGS, 0.1, 0.1], size=4))
    assert [isinstance(one, Reward) for one in found] == [True, False, True, True]
    assert simulated.now == pytest.approx(0.5 + 2.0 + 0.5 + 0.1 + 2.0 + 0.2)


def test_workers_that_hang_at_their_start_fail_everything_at_the_limit_and_are_not_started_again() -> None:
    simulated = Simulated(RewardConfig(workers=3, start_seconds=60.0), start_seconds=HANGS)
    found = simulated.run(groups_of([1.0] * 12, size=2))
    assert (simulated.now, simulated.count) == (60.0, 3)
    assert all("no worker has made its task within task.reward.start_seconds=60" in str(one) for one in found)
    assert simulated.roster.missing(simulated.now) == 0
    simulated.start_seconds = 1.0  # mended
    assert all(isinstance(one, Reward) for one in simulated.run(groups_of([1.0] * 3, size=1)))


def test_what_no_worker_lives_to_take_fails_after_three_of_them() -> None:
    roster, (group,) = Roster(RewardConfig(workers=1)), groups_of([1.0], size=1)
    roster.add(group)
    for number in range(3):
        assert (roster.missing(0.0), group.future.done()) == (1, False)
        roster.started(number, 0.0)
        roster.ready(number, 0.0)
        assert [given for given, _ in roster.give(0.0)] == [number]
        roster.lost(number, "its worker is gone")
    assert group.future.result() == ["its worker is gone"]


def test_what_a_worker_does_not_take_within_an_items_limit_goes_to_another() -> None:
    roster, (group,) = Roster(RewardConfig(workers=1, timeout_seconds=2.0)), groups_of([1.0, 1.0], size=2)
    roster.add(group)
    for number in range(3):
        roster.started(number, 0.0)
        roster.ready(number, 0.0)
        list(roster.give(0.0))
        assert (roster.wait(0.5), list(roster.overdue(1.9))) == (1.5, [])
        ((late, why),) = roster.overdue(2.0)
        roster.lost(late, why, again=False)
    why = "a worker did not take it within task.reward.timeout_seconds=2; raise that, or give rewards less to read"
    assert group.future.result() == [why] * 2


def test_what_nobody_waits_for_is_neither_given_nor_left_with_a_worker() -> None:
    roster, groups = Roster(RewardConfig(workers=1)), groups_of([1.0] * 4, size=2)
    for group in groups:
        roster.add(group)
    roster.started(0, 0.0)
    roster.ready(0, 0.0)
    list(roster.give(0.0))
    roster.took(0, False, 0.0)
    roster.done(0, [Reward(1.0)], 1.0)
    for group in groups:
        group.settle_rest("over")
    assert roster.unwanted() == [0]
    roster.lost(0, "over")
    roster.started(1, 1.0)
    roster.ready(1, 1.0)
    assert list(roster.give(1.0)) == []
    assert [group.future.result() for group in groups] == [[Reward(1.0), "over"], ["over", "over"]]
