"""Sort random letters: `qebaz>` asks for `abeqz`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from string import ascii_lowercase
from typing import Any

from pydantic import PositiveInt

from gspo_moe.config.validation import validated
from gspo_moe.section import Section
from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.tasks.splits import DrawnPrompts
from gspo_moe.types import Conversation, Prompt


class SortLettersOptions(Section):
    """Lengths are drawn uniformly from `min_length` to `max_length`, both included."""

    min_length: PositiveInt = 10
    max_length: PositiveInt = 16

    def faults(self) -> Iterator[str]:
        if self.min_length > self.max_length:
            yield f"min_length={self.min_length} exceeds max_length={self.max_length}; lower the one or raise the other"


class SortLetters(DrawnPrompts):
    """Random lowercase letters, repeats allowed. The exact answer has reward 1, any other 0."""

    name = "sort_letters"

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(seed)
        self._options = validated(SortLettersOptions, options, prefix="task.options.")

    def demonstration(self, prompt: Prompt) -> str:
        return "".join(sorted(prompt.text.removesuffix(">")))

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        return float(last_answer(turns) == self.demonstration(prompt))

    def _entry(self, random: Random) -> tuple[str, dict[str, Any]]:
        length = random.randint(self._options.min_length, self._options.max_length)
        return "".join(random.choices(ascii_lowercase, k=length)) + ">", {}


def sort_letters(options: Mapping[str, Any], seed: int) -> Task:
    """Raises ConfigError for options that do not fit."""
    letters = SortLetters(options, seed)
    return Task(SortLetters.name, prompts=letters, rubric=letters, demonstrate=letters.demonstration)
