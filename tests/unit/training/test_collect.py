"""Which groups a step learns from, and the rewards that their advantages come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gspo_moe.config import load_config
from gspo_moe.data.prompts import PromptPosition
from gspo_moe.errors import RewardError
from gspo_moe.rollout.answers import Answers, ScoredGroup
from gspo_moe.training.checkpoint import Progress
from gspo_moe.training.collect import Collected, collect
from gspo_moe.types import Prompt, Rollout, RolloutGroup

LIMIT = 10


class Table:
    """Answers prompt i with rewards and lengths from a table."""

    def __init__(self, rewards: Sequence[tuple[float, ...]], lengths: Sequence[int]) -> None:
        self.table, self.lengths = rewards, lengths

    def generate(self, prompts: Sequence[Prompt], samples: int, params: Any, version: int) -> list[RolloutGroup]:
        return [
            RolloutGroup(
                prompt,
                tuple(
                    Rollout(prompt.uid, i, (1, 2), (3,) * length, (-1.0,) * length, length < LIMIT, version)
                    for i, length in enumerate(self.lengths[:samples])
                ),
            )
            for prompt in prompts
        ]

    def rewards(self, share: Sequence[RolloutGroup]) -> Answers:
        groups = tuple(ScoredGroup(group, self.table[int(group.prompt.uid)]) for group in share)
        return Answers(groups, failures=1, timeouts=0, first_error=None)


def collected(
    rewards: Sequence[tuple[float, ...]], *overrides: str, lengths: Sequence[int] = (4, 5), position: int = 0
) -> Collected:
    sizes = ("rollout.prompts_per_step=2", "algorithm.mini_batches=1", f"rollout.max_response_tokens={LIMIT}")
    config = load_config(None, [*sizes, f"rollout.samples_per_prompt={len(lengths)}", *overrides])

    @contextlib.contextmanager
    def timers(phase: str) -> Iterator[None]:
        yield

    prompts = SimpleNamespace(prompt=lambda split, index: Prompt(str(index), "?", "table"), size=lambda split: None)
    session = SimpleNamespace(
        config=config,
        plan=SimpleNamespace(task=SimpleNamespace(prompts=prompts)),
        answerer=Table(rewards, lengths),
        timers=timers,
        stop_ids=frozenset(),
        bank=None,
        checked=lambda answers, when: answers,
    )
    trainer: Any = SimpleNamespace(session=session, progress=Progress(step=3, prompt_position=position))
    return collect(trainer)


def uids(found: Collected) -> list[str]:
    return [group.group.prompt.uid for group in found.answers.groups]


EQUAL, DIFFERENT = (1.0, 1.0), (0.0, 1.0)
DYNAMIC = "algorithm.dynamic_sampling=true"


def test_without_dynamic_sampling_the_next_prompts_are_taken_as_they_are() -> None:
    found = collected([EQUAL, EQUAL, DIFFERENT, EQUAL], position=1)
    assert (uids(found), found.prompts) == (["1", "2"], PromptPosition(3))
    assert found.advantages[:2] == [0.0, 0.0]
    assert (found.metrics["groups/drawn"], found.metrics["groups/degenerate"]) == (2, 1)


def test_groups_of_equal_rewards_are_replaced_by_new_prompts() -> None:
    found = collected([EQUAL, DIFFERENT, EQUAL, EQUAL, DIFFERENT, DIFFERENT, EQUAL, EQUAL], DYNAMIC)
    assert (uids(found), found.prompts) == (["1", "4"], PromptPosition(6))
    metrics = found.metrics
    assert (metrics["groups/count"], metrics["groups/drawn"], metrics["groups/degenerate"]) == (2, 6, 3)
    assert metrics["reward/mean"] == pytest.approx((3 * 2 + 3 * 1) / 12)
    assert metrics["reward/failures"] == 3
    assert metrics["rollout/tokens"] == 6 * 9
    assert metrics["throughput/tokens"] == 2 * (9 + 4)


def test_at_the_bound_equal_groups_fill_up_in_order() -> None:
    table = [EQUAL, EQUAL, EQUAL, DIFFERENT, DIFFERENT, DIFFERENT]
    found = collected(table, DYNAMIC, "algorithm.sampling_rounds=2")
    assert (uids(found), found.prompts) == (["0", "3"], PromptPosition(4))


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
    assert found.advantages == pytest.approx(expected, rel=1e-12)
    assert found.metrics["reward/overlong_penalty"] == -1.5 / 4
    assert found.metrics["reward/mean"] == pytest.approx((4 + 2 + 1 + 0) / 16)
    plain = ["algorithm.name=dapo", "algorithm.dynamic_sampling=false", "algorithm.overlong_buffer=0"]
    off = collected(table, *plain, lengths=lengths)
    assert uids(off) == ["0", "1"]
    assert "reward/overlong_penalty" not in off.metrics
    assert off.advantages[:4] == [0.0] * 4


def test_dr_grpo_does_not_scale_advantages() -> None:
    assert collected([(0.0, 1.0), (0.25, 0.75)], "algorithm.name=dr_grpo").advantages == [-0.5, 0.5, -0.25, 0.25]
