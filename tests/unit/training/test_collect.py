"""Which groups a step learns from, and the rewards that their advantages come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gspo_moe.config import load_config
from gspo_moe.data.prompts import PromptPosition, PromptSource
from gspo_moe.errors import RewardError
from gspo_moe.rollout.queue import GroupQueue, Pace
from gspo_moe.training.batch import Batch
from gspo_moe.training.checkpoint import Progress
from gspo_moe.training.collect import collect
from gspo_moe.types import Prompt, Reward, RolloutGroup
from tests.rollouts import rollout

LIMIT = 10


told: list[tuple[int, int, float]] = []  # what the watch on learning was last given


class Table:
    """A source that answers prompt i with rewards and lengths from a table, the last one asked for first."""

    def __init__(self, rewards: Sequence[tuple[float, ...]], lengths: Sequence[int]) -> None:
        self.table, self.lengths = rewards, lengths
        self.asked: list[Prompt] = []

    def ask(self, prompts: Sequence[Prompt], step: int) -> None:
        assert step == 3
        self.asked += prompts

    def take(self) -> list[RolloutGroup]:
        earlier = RolloutGroup(Prompt("of an earlier step", "?", "table"), ())
        return [earlier, self._group(self.asked.pop())]

    def _group(self, prompt: Prompt) -> RolloutGroup:
        parts = zip(self.lengths, self.table[int(prompt.uid)], strict=True)
        failed = "it broke" if prompt.uid == "3" else None
        return RolloutGroup(
            prompt,
            tuple(
                rollout(
                    prompt.uid,
                    i,
                    (1, 2),
                    (3,) * length,
                    finished=length < LIMIT,
                    reward=Reward(reward, {"half": reward / 2}, error=failed),
                )
                for i, (length, reward) in enumerate(parts)
            ),
        )


class Endless:
    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(str(index), "?", "table")

    def size(self, split: str) -> None:
        return None


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gspo_moe.rollout.queue.gather_objects", lambda value, group: [value])


def collected(
    rewards: Sequence[tuple[float, ...]], *overrides: str, lengths: Sequence[int] = (4, 5), position: int = 0
) -> Batch:
    told.clear()
    sizes = ("rollout.prompts_per_step=2", "algorithm.mini_batches=1", f"rollout.max_response_tokens={LIMIT}")
    config = load_config(None, [*sizes, f"rollout.samples_per_prompt={len(lengths)}", *overrides])
    alone: Any = SimpleNamespace(rank=lambda: 0)
    session = SimpleNamespace(
        config=config,
        reward_errors=SimpleNamespace(check=lambda groups, when: None),
        no_learning=SimpleNamespace(step=lambda *counts: told.append(counts)),
    )
    prompts = PromptSource(Endless(), "train", PromptPosition(position))
    queue = GroupQueue(prompts, Table(rewards, lengths), Pace.of(config), alone)
    trainer: Any = SimpleNamespace(session=session, queue=queue, progress=Progress(step=3))
    found = collect(trainer)
    assert prompts.position.pending == tuple(range(position, prompts.position.next)), "used up before they are learnt"
    assert [int(prompt.uid) for prompt in found.prompts] == list(prompts.position.pending)
    return found


def advantages(found: Batch) -> list[float]:
    return [sample.advantage for sample in found.samples]


def uids(found: Batch) -> list[str]:
    return [group.prompt.uid for group in found.groups]


EQUAL, DIFFERENT = (1.0, 1.0), (0.0, 1.0)
DYNAMIC = "algorithm.dynamic_sampling=true"


def test_without_dynamic_sampling_the_next_prompts_are_taken_as_they_are() -> None:
    found = collected([EQUAL, EQUAL, DIFFERENT, EQUAL], position=1)
    assert (uids(found), int(found.prompts[-1].uid) + 1) == (["1", "2"], 3)
    assert advantages(found)[:2] == [0.0, 0.0]
    assert (found.metrics["groups/drawn"], found.metrics["groups/degenerate"]) == (2, 1)
    assert told == [(2, 1, 0.75)]


def test_groups_of_equal_rewards_are_replaced_by_new_prompts() -> None:
    found = collected([EQUAL, DIFFERENT, EQUAL, EQUAL, DIFFERENT, DIFFERENT, EQUAL, EQUAL], DYNAMIC)
    assert (uids(found), int(found.prompts[-1].uid) + 1) == (["1", "4"], 6)
    metrics = found.metrics
    assert (metrics["groups/count"], metrics["groups/drawn"], metrics["groups/degenerate"]) == (2, 6, 3)
    assert metrics["reward/mean"] == pytest.approx((3 * 2 + 3 * 1) / 12)
    assert (metrics["reward/failures"], metrics["reward/failure_rate"]) == (2, pytest.approx(2 / 12))
    assert metrics["reward/parts/half"] == pytest.approx(metrics["reward/mean"] / 2)
    assert metrics["rollout/tokens"] == 6 * 9
    assert metrics["throughput/tokens"] == 2 * (9 + 4)


def test_at_the_bound_equal_groups_fill_up_in_order() -> None:
    table = [EQUAL, EQUAL, EQUAL, DIFFERENT, DIFFERENT, DIFFERENT]
    found = collected(table, DYNAMIC, "algorithm.sampling_rounds=2")
    assert (uids(found), int(found.prompts[-1].uid) + 1) == (["0", "3"], 4)


def test_no_difference_at_all_is_an_error_with_the_fix() -> None:
    with pytest.raises(RewardError, match=r"each of 6 prompts .* algorithm\.dynamic_sampling=false"):
        collected([EQUAL] * 6, DYNAMIC, "algorithm.sampling_rounds=3")


def test_dapo_samples_dynamically_and_shapes_rewards_but_judges_groups_by_the_tasks_own() -> None:
    lengths = (8, 9, 10, 4)  # the buffer is a fifth of 10: 8 is free, 9 costs a half, 10 all
    table = [(1.0,) * 4, (1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)]
    found = collected([*table, (0.0,) * 4], "algorithm.name=dapo", lengths=lengths)
    assert uids(found) == ["1", "2"]
    expected = []
    for rewards in np.array(table[1:]) + np.array([0.0, -0.5, -1.0, 0.0]):
        expected += ((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)).tolist()
    assert advantages(found) == pytest.approx(expected, rel=1e-12)
    assert found.metrics["reward/overlong_penalty"] == -1.5 / 4
    assert found.metrics["reward/mean"] == pytest.approx((4 + 2 + 1 + 0) / 16)
    plain = ["algorithm.name=dapo", "algorithm.dynamic_sampling=false", "algorithm.overlong_buffer=0"]
    collected([(1.0,) * 4] * 2, *plain[:2], lengths=lengths)
    assert told[0][:2] == (2, 0), "the penalty makes a difference where the rewards make none"
    off = collected(table, *plain, lengths=lengths)
    assert uids(off) == ["0", "1"]
    assert "reward/overlong_penalty" not in off.metrics
    assert advantages(off)[:4] == [0.0] * 4


def test_the_over_long_penalty_of_a_conversation_is_its_longest_turns() -> None:
    turns = replace(rollout("0", 0, (1, 2), (3,) * 23), policy_mask=(0, 0, *(1,) * 9, 0, *(1,) * 8, 0, *(1,) * 4))
    assert (turns.longest_turn, rollout("0", 1, (1,), (3,) * 5).longest_turn) == (9, 5)


def test_dr_grpo_does_not_scale_advantages() -> None:
    found = collected([(0.0, 1.0), (0.25, 0.75)], "algorithm.name=dr_grpo")
    assert advantages(found) == [-0.5, 0.5, -0.25, 0.25]
