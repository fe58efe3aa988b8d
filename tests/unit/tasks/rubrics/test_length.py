from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_moe.algorithms.overlong import overlong_penalty
from gspo_moe.errors import ConfigError
from gspo_moe.tasks.rubrics.length import Length
from gspo_moe.types import Conversation, Prompt, Turn

PROMPT = Prompt("train/0", "?", "data")


def turns(*tokens: int) -> Conversation:
    return tuple(turn for count in tokens for turn in (Turn("policy", "x", count), Turn("environment", "y")))


@pytest.mark.parametrize(("tokens", "expected"), [(100, 0.0), (75, -0.25), (110, -0.1), (0, -1.0), (500, -1.0)])
def test_towards_a_target_the_penalty_is_the_relative_distance(tokens: int, expected: float) -> None:
    rubric = Length({"target": 100})
    assert rubric.reward(PROMPT, turns(tokens)) == pytest.approx(expected)
    assert rubric.reward(PROMPT, turns(tokens // 2, tokens - tokens // 2)) == pytest.approx(expected)


def test_below_a_limit_it_is_dapos() -> None:
    lengths = [0, 70, 80, 85, 99, 100, 130]
    rubric = Length({"max_tokens": 100, "buffer": 20})
    found = [rubric.reward(PROMPT, turns(3, length)) for length in lengths]
    assert found == pytest.approx(overlong_penalty(torch.tensor(lengths), 100, 20).tolist())
    assert rubric.reward(PROMPT, ()) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of target and max_tokens"),
        ({"target": 3, "max_tokens": 3, "buffer": 1}, "needs one of target and max_tokens"),
        ({"max_tokens": 3}, "max_tokens and buffer go together"),
        ({"max_tokens": 3, "buffer": 4}, "buffer=4 exceeds max_tokens=3"),
        ({"target": 0}, r"task\.reward\.options\.target=0: expected greater than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Length(options)
