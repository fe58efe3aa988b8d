from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.sort_letters import SortLetters
from gspo_moe.types import Prompt
from tests.turns import answered


def test_prompts_are_letters_of_every_allowed_length() -> None:
    task = SortLetters({"min_length": 3, "max_length": 5}, seed=1)
    prompts = [task.prompt("train", index) for index in range(300)]
    assert all(prompt.text[-1] == ">" and prompt.text[:-1].isalpha() and prompt.text.islower() for prompt in prompts)
    lengths = Counter(len(prompt.text) - 1 for prompt in prompts)
    assert set(lengths) == {3, 4, 5}
    assert min(lengths.values()) > 60
    assert set("".join(prompt.text for prompt in prompts)) == set("abcdefghijklmnopqrstuvwxyz>")
    assert all(prompt.reference == {} for prompt in prompts)


def test_the_default_lengths_are_10_to_16() -> None:
    task = SortLetters({}, seed=1)
    assert {len(task.prompt("eval", index).text) - 1 for index in range(200)} == set(range(10, 17))


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("abeqz", 1.0), ("abezq", 0.0), ("abeq", 0.0), ("abeqzz", 0.0), ("abeqz ", 0.0), ("", 0.0), ("ABEQZ", 0.0)],
)
def test_only_the_exact_answer_is_right(answer: str, reward: float) -> None:
    prompt = Prompt(uid="train/0", text="qebaz>", task="sort_letters")
    task = SortLetters({}, seed=1)
    assert task.demonstration(prompt) == "abeqz"
    assert task.reward(prompt, answered(answer)) == reward


def test_repeated_letters_are_kept() -> None:
    task = SortLetters({}, seed=1)
    assert task.demonstration(Prompt(uid="train/0", text="banana>", task="sort_letters")) == "aaabnn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lenght": 3}, r"unknown key task\.options\.min_lenght=3.*task\.options\.min_length"),
        ({"min_length": 0}, r"task\.options\.min_length=0"),
        ({"max_length": "long"}, r"task\.options\.max_length='long'"),
        ({"min_length": 9, "max_length": 4}, "min_length=9 exceeds max_length=4"),
    ],
)
def test_bad_options_name_key_value_and_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SortLetters(options, seed=1)
