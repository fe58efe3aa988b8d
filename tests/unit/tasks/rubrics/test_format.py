from __future__ import annotations

from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.rubrics.format import Format
from gspo_moe.types import Prompt
from tests.turns import answered

PROMPT = Prompt("train/0", "?", "data")


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("<think>so\n1 < 2</think>\n<answer>7</answer>\n", {}, 1.0),
        ("<think></think><answer></answer>", {}, 1.0),
        ("<answer>7</answer>", {}, 0.0),
        ("well <think>so</think><answer>7</answer>", {}, 0.0),
        ("<think>so</think><answer>7</answer> done", {}, 0.0),
        ("<think>so</think><answer>7</answer><answer>8</answer>", {}, 0.0),
        ("<think>so</think>7", {}, 0.0),
        ("a\nb", {"pattern": "a.b"}, 1.0),
        ("a\nbc", {"pattern": "a.b", "wrong": -0.5}, -0.5),
        ("", {"pattern": ".*", "right": 0.1}, 0.1),
    ],
)
def test_the_whole_answer_must_match(answer: str, options: dict[str, Any], expected: float) -> None:
    assert Format(options).reward(PROMPT, answered(answer)) == expected


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.reward\.options: pattern='\[' is no regular expression"):
        Format({"pattern": "["})
