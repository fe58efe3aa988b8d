from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gspo_moe.errors import RewardError
from gspo_moe.tasks.rewards import Reward, give_reward, give_rewards, part_means, take_step
from gspo_moe.types import Prompt, Turn
from tests.turns import answered

PROMPT = Prompt("train/0", "?", "parts")


def given(value: object) -> Reward | str:
    """What comes of a rubric that gives `value`."""
    task: Any = SimpleNamespace(rubric=SimpleNamespace(reward=lambda prompt, turns: value))
    return give_reward(task, PROMPT, answered("!"))


def test_the_reward_is_the_sum_of_its_parts_unless_one_is_the_reward() -> None:
    assert given(0.5) == Reward(0.5)
    assert given({"right": 1, "short": -0.25}) == Reward(0.75, {"right": 1.0, "short": -0.25})
    assert given({"right": 1.0, "reward": 0.25, "words": 12}) == Reward(0.25, {"right": 1.0, "words": 12.0})
    assert given({"score": 0.25, "acc": True, "pred": "72", "note": None}) == Reward(0.25, {"acc": 1.0})
    assert given({"reward": 0.5, "score": 0.25}) == Reward(0.5, {"score": 0.25})


def test_scalars_of_numpy_are_numbers() -> None:
    assert given(np.float32(0.5)) == given(np.array(0.5)) == Reward(0.5)
    assert given({"right": np.bool_(True), "short": np.int64(2)}) == Reward(3.0, {"right": 1.0, "short": 2.0})
    assert "is no number" in str(given(np.array([0.5])))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "reward gave None, which is no number from -1000000 to 1000000"),
        ({"right": "1"}, "reward gave '1' as 'right', which is no number"),
        ({"score": "1", "acc": 1}, "reward gave '1' as 'score', which is no number"),
        ({"right": float("nan")}, "reward gave nan as 'right', which is no number"),
        ({"reward": 0.5, "words": 2e6}, "reward gave 2000000.0 as 'words', which is no number"),
        ({"one": 9e5, "two": 9e5}, "sum 1.8e+06, which is beyond 1000000 in size"),
        ({}, "reward gave {}; give a number, or at least one part by its name"),
        ({3: 1.0}, "reward gave {3: 1.0}; give a number, or at least one part by its name"),
    ],
)
def test_each_part_and_their_sum_must_be_numbers_that_advantages_can_be_made_of(value: object, message: str) -> None:
    assert message in str(given(value))


@pytest.mark.parametrize("count", [1, 3])
def test_a_call_for_all_must_give_one_reward_for_each(count: int) -> None:
    rubric: Any = SimpleNamespace(rewards=lambda items: [1.0] * count)
    with pytest.raises(RewardError, match=f"rewards gave {count} rewards for 2 answers; give one for each"):
        give_rewards(rubric, [(PROMPT, answered("!"))] * 2)


def test_means_of_parts_are_over_the_rewards_that_have_them() -> None:
    rewards = [Reward(1.0, {"b": 1.0, "a": 0.0}), Reward(0.0, error="broke"), Reward(0.5, {"b": 0.5})]
    assert list(part_means(rewards).items()) == [("a", 0.0), ("b", 0.75)]
    assert part_means([Reward(1.0)]) == {}


def test_an_environments_turn_is_text_or_nothing() -> None:
    environment = SimpleNamespace(reset=lambda prompt: prompt.text, step=lambda prompt, turns: turns[-1].text)
    task: Any = SimpleNamespace(environment=environment)
    wrong: Any = 3
    assert take_step(task, PROMPT, ()) == take_step(task, PROMPT, answered("?"))
    assert take_step(task, PROMPT, (Turn("policy", wrong),)) == "step gave 3, which is neither text nor None"
    environment.reset = lambda prompt: 3
    assert take_step(task, PROMPT, ()) == "reset gave 3, which is neither text nor None"
    refused = "step gave '\\ud800', which no tokenizer takes (surrogates not allowed)"
    assert take_step(task, PROMPT, answered("\ud800")) == refused
