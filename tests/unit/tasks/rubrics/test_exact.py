from __future__ import annotations

from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.rubrics.exact import Exact
from gspo_moe.types import Prompt
from tests.turns import answered


@pytest.mark.parametrize(
    ("reference", "answer", "options", "expected"),
    [
        ("Paris", " Paris\n", {}, 1.0),
        ("Paris", " Paris", {"strip": False}, 0.0),
        ("Paris", "paris", {}, 0.0),
        ("Paris", "PARIS", {"case": False}, 1.0),
        ("straße", "STRASSE", {"case": False}, 1.0),
        ("Paris", "It is Paris", {}, 0.0),
        ("B", "A? No: (B).", {"extract": r"[A-D]"}, 1.0),
        ("B", "#### A\n#### B", {"extract": r"#### (\w+)"}, 1.0),
        ("B", "no marks", {"extract": r"#### (\w+)"}, 0.0),
        ("a\nb", "<a>a\nb</a>", {"extract": "<a>(.*?)</a>"}, 1.0),
        ("B", "<think>A</think> B", {}, 1.0),
        (["3", "three"], "three", {}, 1.0),
        (3, "3", {}, 1.0),
        ("B", "B", {"right": 2, "wrong": -1}, 2.0),
        ("B", "A", {"right": 2, "wrong": -1}, -1.0),
        ("B", "A", {"extract": "(B)", "wrong": -1}, -1.0),
    ],
)
def test_right_is_what_is_the_same_under_the_options(
    reference: Any, answer: str, options: dict[str, Any], expected: float
) -> None:
    prompt = Prompt("train/0", "?", "data", {"answer": reference})
    assert Exact(options).reward(prompt, answered(answer)) == expected


def test_a_prompt_without_an_answer_is_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match=r"task\.reward: train/0 has no answer to compare with"):
        Exact({}).check(Prompt("train/0", "?", "data", {"answer": []}))
