from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.skip_counting import SkipCounting
from gspo_moe.types import Prompt
from tests.turns import answered

REFERENCE = {"start": 88, "added": 7, "steps": 3}


def test_prompts_say_start_step_and_how_many_numbers() -> None:
    task = SkipCounting({"steps": [5, 21]}, seed=1)
    prompts = [task.prompt("train", index) for index in range(300)]
    for prompt in prompts:
        start, added, steps = (prompt.reference[key] for key in ("start", "added", "steps"))
        assert prompt.text == f"{start:02d}"[::-1] + "+" + f"{added:02d}"[::-1] + f"*{steps}>"
        assert 0 <= start < 100
    assert {prompt.reference["added"] for prompt in prompts} == set(range(1, 10))
    counts = Counter(prompt.reference["steps"] for prompt in prompts)
    assert set(counts) == {5, 21}
    assert min(counts.values()) > 110
    assert len({prompt.text for prompt in prompts}) > 200


def test_a_demonstration_is_the_numbers_modulo_100_and_as_long_as_the_options_say() -> None:
    task = SkipCounting({"steps": [85]}, seed=3)
    assert task.demonstration(Prompt(uid="train/0", text="88+70*3>", task="", reference=REFERENCE)) == "59 20 90"
    prompt = task.prompt("sft", 0)
    answer = task.demonstration(prompt)
    assert len(answer) + 1 == 3 * 85
    assert [int(number[::-1]) for number in answer.split(" ")] == [
        (prompt.reference["start"] + k * prompt.reference["added"]) % 100 for k in range(1, 86)
    ]
    assert task.reward(prompt, answered(answer)) == 1.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("59 20 90", 1.0),
        ("58 29 99", 2 / 3),  # the first number is wrong, and the others add to what is there
        ("59 20", 2 / 3),
        ("59 20 90 61", 3 / 4),
        ("59 21 90", 1 / 3),
        ("59  20 90", 1 / 4),
        ("59 2090", 1 / 3),
        ("", 0.0),
        ("ninety-five", 0.0),
        ("9" * 5000 + " 20 90", 1 / 3),
    ],
)
def test_the_reward_is_the_share_of_right_steps(answer: str, reward: float) -> None:
    task = SkipCounting({}, seed=1)
    prompt = Prompt(uid="train/0", text="88+70*3>", task="skip_counting", reference=REFERENCE)
    assert task.reward(prompt, answered(answer)) == pytest.approx(reward, abs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": [3]}, r"unknown key task\.options\.step=.*task\.options\.steps"),
        ({"steps": [0]}, r"task\.options\.steps"),
        ({"steps": []}, r"task\.options\.steps"),
        ({"steps": 5}, r"task\.options\.steps=5"),
    ],
)
def test_bad_options_name_key_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SkipCounting(options, seed=1)
