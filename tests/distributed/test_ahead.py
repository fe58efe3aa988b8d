"""Answers sampled ahead over several ranks: who asks, who gets what, and that a fault ends all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.config import load_config
from gspo_moe.data.prompts import PromptSource
from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import RolloutError
from gspo_moe.observability.timers import Timers
from gspo_moe.parallel.groups import initialize
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.rollout.answers import Answerer
from gspo_moe.rollout.queue import GroupQueue, Pace
from gspo_moe.rollout.servers.ahead import ServerSource
from gspo_moe.rollout.servers.records import Answer, Ask
from gspo_moe.tasks.pool import Item
from gspo_moe.types import Conversation, Prompt, Reward
from tests.launch import launch
from tests.qwen3 import layout
from tests.servers import Servers
from tests.simulated import STOP, Endless, Letters, answer

COUNT, SAMPLES = 3, 2


class Pool:
    def begin(self, prompts: Sequence[Prompt]) -> Callable[[int, Conversation], None]:
        return lambda index, turns: None

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        return [Reward(float(len(turns[-1].text))) for _, turns in items]

    def forget(self, prompts: Sequence[Prompt]) -> None:
        pass


class Threaded(Servers):
    """`Servers` that answer on another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Ask] = []
        self.fault: RolloutError | None = None
        self._thread = ThreadPoolExecutor(1)

    def submit(self, ask: Ask) -> Future[Answer]:
        self.asked.append(ask)
        return self._thread.submit(self._answer, ask)

    def _answer(self, ask: Ask) -> Answer:
        if self.fault is not None:
            raise self.fault
        return answer(ask, 1 + (int(ask.uid) + ask.sample_index) % 4, "stop", 0)


def _ahead(drops: bool) -> None:
    groups = initialize(layout(4, tensor=2), seed=1)
    talks = groups.model.rank() == 0
    servers, pool, engine = Threaded(), Pool(), SimpleNamespace(room=lambda params: 99)
    answerer: Any = Answerer(engine, Renderer(Letters()), pool, groups)  # type: ignore[arg-type]
    config = load_config(None, [f"rollout.samples_per_prompt={SAMPLES}"])
    parts: Any = (servers if talks else None, answerer, config, frozenset({STOP}), Timers(lambda: None), StopSignals())
    source, prompts = ServerSource(*parts), PromptSource(Endless(), "train")
    pace = Pace(COUNT, steps=9, updates=1, max_staleness=1, drops=drops)
    queue = GroupQueue(prompts, source, pace, groups.data_context, source)
    for step in range(4):
        found = queue.draw(step, version=0 if step < 2 else 1)
        queue.figures()
        everyone = gather_objects([(group.prompt.uid, group.rewards) for group in found])
        assert all(each == everyone[0] for each in everyone), "ranks learn from other groups"
        uids = [group.prompt.uid for group in found]
        assert drops or uids == [str(index) for index in range(COUNT * step, COUNT * (step + 1))]
        mine = {group.prompt.uid for group in found if all(one.routes is not None for one in group.rollouts)}
        assert mine == {group.prompt.uid for group in found if any(one.routes is not None for one in group.rollouts)}
        shares = gather_objects((groups.data_rank, groups.model.rank(), mine, {ask.uid for ask in servers.asked}))
        for data_rank, model_rank, has, asked in shares:
            assert model_rank == 0 or not asked, "one process of a replica asks"
            assert has == shares[2 * data_rank][2], "all of a replica have the routes of what it trains on"
        assert sorted(uid for _, model_rank, has, _ in shares if model_rank == 0 for uid in has) == sorted(uids)
        prompts.done(group.prompt for group in found)
    if groups.data_rank == 1:
        servers.fault = RolloutError("a server of the second replica is gone")
    with pytest.raises(RolloutError, match="of the second replica"):
        _draw_all(queue)
    source.close()


def _draw_all(queue: GroupQueue) -> None:
    for step in range(4, 9):
        queue.draw(step, version=1)


@pytest.mark.parametrize("drops", [False, True])
def test_first_ranks_ask_all_learn_the_same_and_a_fault_is_everyones(drops: bool) -> None:
    launch(_ahead, 4, drops)
