"""Problems with tests, as LiveCodeBench and open-r1/codeforces publish them."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from typing import Any

import pytest

from gspo_moe.errors import DataError
from gspo_moe.tasks.files.columns import Columns
from gspo_moe.tasks.files.pickled import pickled_text
from gspo_moe.tasks.files.programming import parse_codeforces, parse_livecodebench

PUBLIC = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
PRIVATE = [{"input": "5\n", "output": "6\u00e4\n", "testtype": "stdin"}]
LIVE: dict[str, Any] = {
    "question_title": "Next",
    "question_content": "Print n + 1.",
    "platform": "atcoder",
    "question_id": "abc_a",
    "starter_code": "",
    "metadata": "{}",
}


def packed(tests: Any, protocol: int = 4) -> str:
    """As the public release packs private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol))).decode()


def live(public: Any = PUBLIC, private: Any = None, **changed: Any) -> dict[str, Any]:
    private = packed(PRIVATE) if private is None else private
    return {**LIVE, "public_test_cases": json.dumps(public), "private_test_cases": private, **changed}


@pytest.mark.parametrize("private", [packed(PRIVATE), packed(PRIVATE, protocol=0), json.dumps(PRIVATE), PRIVATE])
def test_public_and_packed_private_tests_of_a_program(private: Any) -> None:
    parsed = parse_livecodebench(live(private=private), Columns())
    assert parsed.tests == {"kind": "stdin", "inputs": ["1\n", "5\n"], "outputs": ["2\n", "6ä\n"]}
    assert parsed.text.startswith("Print n + 1.\n\n")
    assert "stdin" in parsed.text


def test_tests_of_a_function_have_its_name_and_the_prompt_its_head() -> None:
    tests = [{"input": "[1, 2]\n3", "output": "4", "testtype": "functional"}]
    head = "class Solution:\n    def add(self, a: list[int], b: int) -> int:\n        "
    record = live(tests, packed(tests), starter_code=head, metadata='{"func_name": "add"}')
    parsed = parse_livecodebench(record, Columns())
    assert parsed.tests == {
        "kind": "function",
        "function": "add",
        "inputs": ["[1, 2]\n3"] * 2,
        "outputs": ["4"] * 2,
    }
    assert f"```python\n{head.rstrip()}\n```" in parsed.text
    with pytest.raises(DataError, match="no func_name"):
        parse_livecodebench({**record, "metadata": "{}"}, Columns())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_a_pickle_is_never_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    with pytest.raises(DataError, match="may hold one text only"):
        parse_livecodebench(live(private=content), Columns())
    assert list(tmp_path.iterdir()) == []
    for other in ([1], ["a", "b"], b"bytes", None, {"a": "b"}):
        with pytest.raises(DataError, match="its pickle"):
            pickled_text(pickle.dumps(other))
    with pytest.raises(DataError, match="cannot be read"):
        pickled_text(pickle.dumps("whole")[:-3])


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"private_test_cases": "%%%"}, "neither JSON nor packed"),
        ({"private_test_cases": packed(PRIVATE)[:40]}, "neither JSON nor packed|cut off"),
        ({"private_test_cases": packed({"a": 1})}, "no list of tests"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "no test cases"),
        ({"public_test_cases": '[{"input": "1"}]', "private_test_cases": ""}, "output is null"),
        ({"private_test_cases": '[{"input": "", "output": "", "testtype": "functional"}]'}, "types functional, stdin"),
        ({"question_content": None}, "question_content is null"),
    ],
)
def test_broken_tests_are_named(changed: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        parse_livecodebench({**live(), **changed}, Columns())


FORCES: dict[str, Any] = {
    "id": "1/A",
    "title": "Theatre",
    "description": "Pave a square.",
    "input_format": "n, m and a.",
    "output_format": "The number of stones.",
    "interaction_format": None,
    "note": None,
    "examples": [{"input": "6 6 4", "output": "4"}],
    "official_tests": [{"input": "6 6 4", "output": "4"}, {"input": "1 1 1", "output": "1"}],
    "time_limit": 1.5,
    "memory_limit": 256.0,
    "input_mode": "stdio",
    "generated_checker": None,
}


def test_codeforces_has_a_statement_and_each_test_once() -> None:
    parsed = parse_codeforces(FORCES, Columns())
    assert parsed.tests == {
        "kind": "stdin",
        "inputs": ["6 6 4", "1 1 1"],
        "outputs": ["4", "1"],
        "time_limit_seconds": 1.5,
    }
    for part in (
        "# Theatre\n\nPave a square.",
        "## Input\nn, m and a.",
        "Time limit: 1.5 seconds",
        "Output:\n```\n4\n",
    ):
        assert part in parsed.text
    assert "## Note" not in parsed.text
    only_examples = parse_codeforces({**FORCES, "official_tests": None}, Columns())
    assert only_examples.tests is not None
    assert only_examples.tests["inputs"] == ["6 6 4"]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"interaction_format": "Ask."}, "interactive"),
        ({"input_mode": "file"}, "reads a file"),
        ({"generated_checker": "import sys"}, "no checker is run"),
        ({"examples": [], "official_tests": None}, "neither official_tests nor examples"),
        ({"examples": [{"input": None, "output": ""}]}, "input is null"),
    ],
)
def test_what_tests_cannot_decide_is_named(changed: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        parse_codeforces({**FORCES, **changed}, Columns())
