"""Tests of a program, as LiveCodeBench, CodeForces, MBPP and HumanEval have them, and how outputs compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gspo_moe.errors import DataError
from gspo_moe.plain_json import parse_json

Kind = Literal["stdin", "assert", "function"]


@dataclass(frozen=True)
class ProgramTests:
    """kind stdin: `inputs` and `outputs` are standard streams. function: an input is a call's arguments, one JSON value
    a line, an output its result as JSON. assert: `code` are statements that raise where the program is wrong.

    function: the name that is called, a function's or a method's of class Solution; null is the last one defined.
    time_limit_seconds: of each test, in place of the sandbox's own.
    """

    kind: Kind
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    function: str | None = None
    time_limit_seconds: float | None = None

    @classmethod
    def from_json(cls, values: Any, where: str) -> ProgramTests:
        """Raises DataError, which names `where`, for what is no tests."""
        if isinstance(values, str):
            try:
                values = parse_json(values)
            except ValueError as error:
                raise DataError(
                    f"{where}: tests are neither a mapping nor JSON ({error}); correct the record"
                ) from None
        if not isinstance(values, Mapping) or values.get("kind") not in ("stdin", "assert", "function"):
            raise DataError(f"{where}: tests={str(values)[:80]!r} have no kind stdin, assert or function; give one")
        lists = {name: _texts(values.get(name), name, where) for name in ("inputs", "outputs", "code")}
        tests = cls(
            values["kind"],
            **lists,
            function=values.get("function"),
            time_limit_seconds=values.get("time_limit_seconds"),
        )
        if tests.kind != "assert" and len(tests.inputs) != len(tests.outputs):
            raise DataError(
                f"{where}: tests have {len(tests.inputs)} inputs and {len(tests.outputs)} outputs; give as many of each"
            )
        if not len(tests):
            raise DataError(f"{where}: tests of kind {tests.kind} are empty; give one, or leave the record out")
        return tests

    def __len__(self) -> int:
        return len(self.code if self.kind == "assert" else self.inputs)


def _texts(values: Any, name: str, where: str) -> tuple[str, ...]:
    if values is None:
        return ()
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not all(isinstance(one, str) for one in values):
        raise DataError(f"{where}: tests.{name} are not a list of texts; correct the record")
    return tuple(values)


def same_output(found: str, expected: str, by_lines: bool, tolerance: float) -> bool:
    """Whether a judge takes `found` for `expected`: word by word, or line by line but for spaces at their ends.

    Numbers written with a point or an exponent are compared as numbers, `tolerance` apart at most, absolute below 1
    and relative above.
    """
    left, right = ([line.split() for line in text.strip().splitlines()] for text in (found, expected))
    if by_lines:
        rows = [text.rstrip().split("\n") for text in (found, expected)]
        if len(rows[0]) != len(rows[1]):
            return False
        if all(a.rstrip() == b.rstrip() for a, b in zip(*rows, strict=True)):
            return True
        if [len(line) for line in left] != [len(line) for line in right]:
            return False
    words = [[word for line in lines for word in line] for lines in (left, right)]
    return len(words[0]) == len(words[1]) and all(
        a == b or _close(a, b, tolerance) for a, b in zip(*words, strict=True)
    )


def _close(found: str, expected: str, tolerance: float) -> bool:
    if not set(expected) & set(".eE"):
        return False
    try:
        return _near(float(found), float(expected), tolerance)
    except ValueError:
        return False


def _near(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


def same_value(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two JSON values are alike; floats as `same_output` has them, true and false no numbers."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return found == expected or (isinstance(expected, float) and _near(found, expected, tolerance))
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_value, found, expected, [tolerance] * len(found)))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_value(found[k], expected[k], tolerance) for k in expected)
    return type(found) is type(expected) and found == expected
