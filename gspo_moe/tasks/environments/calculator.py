"""A calculator as a tool: exact integers and fractions of them, never more work than a moment's."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from pydantic import PositiveInt

from gspo_moe.config.validation import validated
from gspo_moe.tasks.environments.calls import ToolEnvironment, ToolOptions, schema

KEY = "task.environment.options"
LONGEST = 400  # characters of an expression
LARGEST_BITS = 4096  # of an integer, on the way as at the end
SECONDS = 1.0

Number = Fraction | float
SPELLINGS = {ord("^"): "**", 0xD7: "*", 0xF7: "/"}  # the signs of school for times and divided by

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "floor": math.floor,
    "ceil": math.ceil,
    "gcd": lambda *numbers: math.gcd(*map(_whole, numbers)),
}
CONSTANTS = {"pi": math.pi, "e": math.e}


class CalculatorOptions(ToolOptions):
    """max_operations: of one expression; 1 has the policy go step by step."""

    max_operations: PositiveInt = 50


class Calculator:
    name, argument, lines = "calculator", "expression", False

    def __init__(self, max_operations: int = 50) -> None:
        self._max_operations = max_operations

    @property
    def schema(self) -> dict[str, Any]:
        return schema(
            self.name,
            "Computes an arithmetic expression exactly.",
            self.argument,
            f"Numbers with + - * / // % ** and ( ), {', '.join(FUNCTIONS)}, pi and e",
        )

    def call(self, argument: str, seconds: float) -> str:
        """The value: an integer, a fraction in lowest terms with its decimals, or decimals; else `error: ...`."""
        if len(argument) > LONGEST:
            return f"error: an expression has at most {LONGEST} characters"
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(argument.strip().translate(SPELLINGS), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return "error: not an arithmetic expression"
        operations = sum(isinstance(node, ast.BinOp | ast.Call) for node in ast.walk(tree))
        if operations > self._max_operations:
            return f"error: at most {self._max_operations} operations in an expression"
        try:
            return _shown(_value(tree.body))
        except ZeroDivisionError:
            return "error: division by zero"
        except (ValueError, TypeError, ArithmeticError) as error:
            return f"error: {error}"


def calculator(options: Mapping[str, Any]) -> ToolEnvironment:
    """Raises ConfigError for options that do not fit."""
    found = validated(CalculatorOptions, options, prefix=f"{KEY}.")
    return ToolEnvironment(Calculator(found.max_operations), found, SECONDS)


def _value(node: ast.AST) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(node.value) if isinstance(node.value, int) else Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return _bounded(UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in BINARY:
            return _bounded(BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in FUNCTIONS:
            return _bounded(FUNCTIONS[node.func.id](*map(_value, node.args)))
        raise ValueError(f"there is no function {node.func.id[:30]}")
    raise ValueError("not an arithmetic expression")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent) > LARGEST_BITS:
            raise ValueError("too large a number")
        return base**exponent.numerator
    found = float(base) ** float(exponent)
    if isinstance(found, complex):
        raise ValueError("not a real number")
    return found


def _bounded(value: Any) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("too large a number")
        return value
    exact = Fraction(value)
    if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > LARGEST_BITS:
        raise ValueError("too large a number")
    return exact


def _whole(value: Number) -> int:
    if value != int(value):
        raise ValueError("gcd takes whole numbers")
    return int(value)


def _shown(value: Number) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    if value.denominator == 1:
        return str(value.numerator)
    try:
        decimal = f"{float(value):.12g}"
    except OverflowError:
        return f"{value.numerator}/{value.denominator}"
    return decimal if Fraction(decimal) == value else f"{value.numerator}/{value.denominator} = {decimal}"
