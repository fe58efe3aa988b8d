"""How outputs compare, and what is no tests."""

from __future__ import annotations

from typing import Any

import pytest

from gspo_moe.errors import DataError
from gspo_moe.tasks.sandbox.cases import ProgramTests, same_output, same_value


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "by_tokens", "by_lines"),
    [
        ("1 2\n3\n", "1 2\n3", 0, True, True),
        ("1 2  \n3 \n\n", "1 2\n3", 0, True, True),
        ("1  2\n3", "1 2\n3", 0, True, True),
        ("1\n2 3", "1 2\n3", 0, True, False),
        ("\n1", "1", 0, True, False),
        ("1.0", "1", 0, False, False),
        ("1", "1.0", 0, True, True),
        ("1e2", "100.0", 0, True, True),
        ("0.3333", "0.33333333", 1e-3, True, True),
        ("0.3333", "0.33333333", 1e-6, False, False),
        ("1000001", "1000000.0", 1e-6, True, True),
        ("nan", "1.0", 1, False, False),
        ("Yes", "yes", 0, False, False),
        ("1 2 3", "1 2", 0, False, False),
        ("", "", 0, True, True),
    ],
)
def test_outputs_compare_as_a_judge_does(
    found: str, expected: str, tolerance: float, by_tokens: bool, by_lines: bool
) -> None:
    assert same_output(found, expected, False, tolerance) is by_tokens
    assert same_output(found, expected, True, tolerance) is by_lines


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (1, 1.0, True),
        (1.0000001, 1.0, True),
        (2, 1, False),
        (True, 1, False),
        (1, True, False),
        (None, 0, False),
        ([1, [2.0]], [1, [2]], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
    ],
)
def test_values_compare_by_kind(found: Any, expected: Any, same: bool) -> None:
    assert same_value(found, expected, 1e-6) is same


def test_tests_come_of_json() -> None:
    values = {"kind": "stdin", "inputs": ["1"], "outputs": ["2"], "time_limit_seconds": 2.0}
    assert ProgramTests.from_json(values, "p") == ProgramTests("stdin", ("1",), ("2",), time_limit_seconds=2.0)
    assert ProgramTests.from_json('{"kind": "assert", "code": "assert f()"}', "p").code == ("assert f()",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[", "p: tests are neither a mapping nor JSON"),
        ({}, "p: tests='{}' have no kind"),
        ({"kind": "stdin", "inputs": ["1"]}, "p: tests have 1 inputs and 0 outputs"),
        ({"kind": "stdin", "inputs": [1], "outputs": ["1"]}, r"p: tests\.inputs are not a list of texts"),
        ({"kind": "assert"}, "p: tests of kind assert are empty"),
    ],
)
def test_what_is_no_tests_is_named(values: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ProgramTests.from_json(values, "p")
