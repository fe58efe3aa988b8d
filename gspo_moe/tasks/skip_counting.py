"""Count on in steps, units first: `88+70*3>` asks for 88 + 7 and the two after it, `59 20 90`, modulo 100."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from gspo_moe.config.validation import validated
from gspo_moe.section import Section
from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.tasks.splits import DrawnPrompts
from gspo_moe.types import Conversation, Prompt

MODULUS = 100
DIGITS = 2
LARGEST_STEP = 9


class SkipCountingOptions(Section):
    """How many numbers an answer has: drawn from `steps`, each as likely. n numbers are 3 n tokens with the end."""

    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5,)


class SkipCounting(DrawnPrompts):
    """Steps of 1 to 9. The reward is the share of right steps, so that answers of any length are told apart.

    A step is right where it adds correctly to what the answer says before it: one error costs one step. Steps that are
    missing or too many are wrong.
    """

    name = "skip_counting"

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(seed)
        self._options = validated(SkipCountingOptions, options, prefix="task.options.")

    def demonstration(self, prompt: Prompt) -> str:
        start, added, steps = (prompt.reference[key] for key in ("start", "added", "steps"))
        return " ".join(_written(start + added * step) for step in range(1, steps + 1))

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        start, added, steps = (prompt.reference[key] for key in ("start", "added", "steps"))
        numbers = [_written(start), *last_answer(turns).split(" ")]
        right = sum(
            _is_number(before) and after == _written(_read(before) + added)
            for before, after in pairwise(numbers[: steps + 1])
        )
        return right / max(steps, len(numbers) - 1)

    def _entry(self, random: Random) -> tuple[str, dict[str, Any]]:
        start, added = random.randrange(MODULUS), random.randint(1, LARGEST_STEP)
        steps = random.choice(self._options.steps)
        reference = {"start": start, "added": added, "steps": steps}
        return f"{_written(start)}+{_written(added)}*{steps}>", reference


def _is_number(text: str) -> bool:
    return len(text) == DIGITS and text.isdecimal()


def _written(number: int) -> str:
    return f"{number % MODULUS:0{DIGITS}d}"[::-1]


def _read(text: str) -> int:
    return int(text[::-1])


def skip_counting(options: Mapping[str, Any], seed: int) -> Task:
    """Raises ConfigError for options that do not fit."""
    counting = SkipCounting(options, seed)
    return Task(SkipCounting.name, prompts=counting, rubric=counting, demonstrate=counting.demonstration)
