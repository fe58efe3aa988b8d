"""The reward `math`: the answer's last boxed expression, else its last one, is equal to the reference (math-verify).

math-verify and SymPy may run for ever on what a policy writes: `9**9**9`, a hundred thousand brackets. What is too
long, too deep or too large is wrong before it gets there, and a timer of this process ends the rest.
"""

from __future__ import annotations

import logging
import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Annotated, Any

from pydantic import Field, PositiveFloat

from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.packages import require
from gspo_moe.section import Section
from gspo_moe.tasks.rubrics.given import final_answer, reference_answers
from gspo_moe.types import Conversation, Prompt

LONGEST = 2_000  # characters of an expression, and of an answer's end that an unboxed one is looked for in
DEEPEST = 40  # brackets within one another
LARGEST_DIGITS = 10_000  # of a number that an expression contains
GOLD_SECONDS = 5.0
_DOLLAR = re.compile(r"(?<!\\)\$")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


class MathOptions(Section):
    """boxed_only: without \\boxed{...} the answer is wrong. decimals: to which numbers are compared.

    seconds: what one answer may take; a longer one is wrong. right, wrong: the rewards.
    """

    boxed_only: bool = False
    decimals: Annotated[int, Field(ge=0, le=15)] = 6
    seconds: PositiveFloat = 5.0
    right: float = 1.0
    wrong: float = 0.0


class MathAnswer:
    """Raises ConfigError where the package math-verify is missing. Its timer needs the main thread of its process."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = validated(MathOptions, options, prefix="task.reward.options.")
        require("math-verify")

    def check(self, prompt: Prompt) -> None:
        try:
            references = reference_answers(prompt)
        except DataError as error:
            raise ConfigError(f"task.reward=math: {error}") from None
        if not all(map(str.strip, references)):
            raise ConfigError(f"task.reward=math: the answer of {prompt.uid} is empty; give it one, or leave it out")

    def prepare(self) -> None:
        _gold("1")

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        """Raises DataError for a reference that is no expression."""
        golds = [_gold(one) for one in reference_answers(prompt)]
        for gold, reference in zip(golds, reference_answers(prompt), strict=True):
            if not gold:
                raise DataError(
                    f"{prompt.uid} has the answer {reference[:80]!r}, which math-verify cannot read; mend it"
                )
        answer = expression_of(final_answer(turns), boxed_only=self._options.boxed_only)
        return self._options.right if answer is not None and self._agrees(golds, answer) else self._options.wrong

    def _agrees(self, golds: list[list[Any]], answer: str) -> bool:
        from math_verify import verify

        try:
            with _time_limit(self._options.seconds):
                found = _parsed(answer)
                if any(one == other for gold in golds for one in gold for other in found):
                    return True
                if any(map(_too_large, found)):
                    return False
                return any(verify(gold, found, self._options.decimals, timeout_seconds=None) for gold in golds)
        except (_TimeUp, RecursionError, MemoryError):
            return False


def expression_of(text: str, *, boxed_only: bool) -> str | None:
    """What to parse of an answer: its last whole box, else its end; None where there is none, or one beyond limits."""
    box = last_box(text)
    if box is None:
        if boxed_only or _BOXED.search(text):  # a box that was cut off is no answer
            return None
        return text[-LONGEST:] if _depth(text[-LONGEST:]) <= DEEPEST else None
    return f"\\boxed{{{box}}}" if len(box) <= LONGEST and _depth(box) <= DEEPEST else None


def last_box(text: str) -> str | None:
    """What stands in the last \\boxed{...} that is closed, the outermost of nested ones; None without one."""
    found, position = None, 0
    while (start := _BOXED.search(text, position)) is not None:
        end = _closing(text, start.end())
        if end is None:
            return found
        found, position = text[start.end() : end], end
    return found


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed."""
    depth, escaped = 1, False
    for position in range(start, len(text)):
        letter = text[position]
        if not escaped and letter in "{}":
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return position
        escaped = letter == "\\" and not escaped
    return None


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=4096)
def _gold(reference: str) -> list[Any]:
    """The reference parsed, which may have its box or be a bare expression; empty where it is none."""
    bare = not _BOXED.search(reference) and not _DOLLAR.search(reference)
    text = expression_of(f"\\boxed{{{reference}}}" if bare else reference, boxed_only=False)
    if text is None or not reference.strip():
        return []
    try:
        with _time_limit(GOLD_SECONDS):
            found = _parsed(text)
    except (_TimeUp, RecursionError, MemoryError):
        return []
    return [] if all(isinstance(one, str) for one in found) else found


def _parsed(text: str) -> list[Any]:
    """math-verify's expressions in `text`; a text where it found one that it cannot read."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # Its own timers are whole seconds, and what it logs is the whole answer.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, targets, parsing_timeout=None)


def _too_large(expression: Any) -> bool:
    """Whether some number in it has more than `LARGEST_DIGITS` digits, as far as that shows without computing it."""
    return not isinstance(expression, str) and _digits(expression) > LARGEST_DIGITS


def _digits(expression: Any) -> float:
    """About how many decimal digits the largest number in a SymPy expression has, before or behind the point."""
    if not expression.args:
        if getattr(expression, "is_Rational", False):
            return max(math.log10(max(abs(int(expression.p)), 1)), math.log10(int(expression.q)))
        return abs(math.log10(abs(float(expression)) or 1.0)) if getattr(expression, "is_Float", False) else 0.0
    inner, kind = [_digits(one) for one in expression.args], type(expression).__name__
    if kind == "Pow" and expression.args[1].is_number:
        return max(inner[0], math.log10(2)) * 10.0 ** min(inner[1], 300.0)
    if kind in ("factorial", "factorial2", "subfactorial", "gamma", "binomial"):
        return max(inner) * 10.0 ** min(max(inner), 300.0)
    return sum(inner) if kind == "Mul" else max(inner) + math.log10(len(inner))


class _TimeUp(BaseException):
    """No Exception, as the library catches these."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _TimeUp in this thread, the main one, when time is up, and again where something swallowed it."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
