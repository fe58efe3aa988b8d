from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.evaluation.answers import check_answers_file, write_answers
from gspo_moe.types import Message, Prompt, Reward, RolloutGroup, Turn
from tests.rollouts import rollout


def test_a_line_has_all_of_a_prompt(tmp_path: Path) -> None:
    right = rollout("eval/a", 0, (1, 2), (3, 4), text="é\n7", reward=Reward(1.0, {"answer": 0.75, "format": 0.25}))
    wrong = rollout("eval/a", 1, (1, 2), (3,), finished=False, text="8", reward=Reward(0.0, error="bad \udcff byte"))
    turns = (Turn("policy", "6*7", 2), Turn("environment", "42"), Turn("policy", "It is 42.", 1))
    talk = replace(right, turns=turns)
    chat = Prompt("eval/b", "", "data", messages=(Message("system", "Be brief."), Message("user", "6*7?")))
    asked = Prompt("eval/a", "3+4?", "data", reference={"answer": "7"})
    file = tmp_path / "new" / "answers.jsonl"
    write_answers(file, [RolloutGroup(asked, (right, wrong)), RolloutGroup(chat, (talk,))])
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert first == {
        "uid": "eval/a",
        "task": "data",
        "prompt": "3+4?",
        "reference": {"answer": "7"},
        "correct": 1,
        "answers": [
            {"text": "é\n7", "reward": 1.0, "parts": {"answer": 0.75, "format": 0.25}, "finish": "stop", "tokens": 2},
            {"text": "8", "reward": 0.0, "error": "bad \udcff byte", "finish": "length", "tokens": 1},
        ],
    }
    assert second["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
    assert second["prompt"] == "system: Be brief.\nuser: 6*7?"
    (answer,) = second["answers"]
    assert answer["text"] == "policy: 6*7\nenvironment: 42\npolicy: It is 42."
    assert answer["turns"] == [
        {"role": "policy", "text": "6*7", "tokens": 2},
        {"role": "environment", "text": "42", "tokens": 0},
        {"role": "policy", "text": "It is 42.", "tokens": 1},
    ]


def test_a_file_that_is_there_is_only_replaced_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    check_answers_file(file, overwrite=False)
    file.write_text("earlier")
    with pytest.raises(ConfigError, match=r"--output .*answers\.jsonl exists; .*--overwrite"):
        check_answers_file(file, overwrite=False)
    check_answers_file(file, overwrite=True)
    with pytest.raises(ConfigError, match=r"--output .* is a folder; name a file"):
        check_answers_file(tmp_path, overwrite=True)
