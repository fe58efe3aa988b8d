"""The calculator against Python's own numbers, and what it refuses."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from gspo_moe.tasks.environments.calculator import Calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2+3*4", "14"),
        ("(2+3)*-4", "-20"),
        ("7//2 + 7%2", "4"),
        ("-7//2", "-4"),
        ("2**10", "1024"),
        ("2^3", "8"),
        ("3 \u00d7 4 \u00f7 6", "2"),
        ("1/4", "0.25"),
        ("1/3", "1/3 = 0.333333333333"),
        ("0.1+0.2", "0.3"),
        ("2**-1", "0.5"),
        ("sqrt(2)", "1.41421356237"),
        ("2**0.5", "1.41421356237"),
        ("max(3, 4) + gcd(12, 18)", "10"),
        ("round(7/2)", "4"),
        ("pi", "3.14159265359"),
        ("10**30", str(10**30)),
    ],
)
def test_values(expression: str, result: str) -> None:
    assert Calculator().call(expression, 1.0) == result


def test_integers_and_fractions_are_exact() -> None:
    expected = Fraction(10**25 + 1, 3) - Fraction(2, 7)
    assert Calculator().call("(10**25+1)/3 - 2/7", 1.0).split(" = ")[0] == str(expected)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", "too large a number"),
        ("2**(10**9)", "too large a number"),
        ("(9**999)**9", "too large a number"),
        ("*".join(["9**999"] * 5), "too large a number"),
        ("exp(10**4)", "math range error"),
        ("1/0", "division by zero"),
        ("(-8)**0.5", "not a real number"),
        ("__import__('os')", "there is no function __import__"),
        ("(1).real", "not an arithmetic expression"),
        ("x", "not an arithmetic expression"),
        ("'a'*9", "not an arithmetic expression"),
        ("True", "not an arithmetic expression"),
        ("1 if 1 else 2", "not an arithmetic expression"),
        ("(1", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("(" * 300, "not an arithmetic expression"),
        ("\0", "not an arithmetic expression"),
        ("1+" * 200 + "1", "an expression has at most 400 characters"),
        ("1+" * 60 + "1", "at most 50 operations in an expression"),
    ],
)
def test_refusals_take_no_time(expression: str, message: str) -> None:
    begun = time.process_time()
    assert Calculator().call(expression, 1.0) == f"error: {message}"
    assert time.process_time() - begun < 1.0


def test_one_operation_at_a_time() -> None:
    assert Calculator(max_operations=1).call("1+2", 1.0) == "3"
    assert Calculator(max_operations=1).call("1+2+3", 1.0) == "error: at most 1 operations in an expression"
