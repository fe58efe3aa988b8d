"""The reward `exact`: the answer is the reference, letter by letter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.section import Section
from gspo_moe.tasks.rubrics.given import final_answer, reference_answers
from gspo_moe.types import Conversation, Prompt


class ExactOptions(Section):
    """strip: leaves out white space around both. case: letters must agree in it.

    extract: a regular expression whose last match in the answer is compared, of it the first group where it has one;
    without a match the answer is wrong. right, wrong: the rewards.
    """

    strip: bool = True
    case: bool = True
    extract: str | None = None
    right: float = 1.0
    wrong: float = 0.0

    def faults(self) -> Iterator[str]:
        if self.extract is not None:
            yield from regex_faults("extract", self.extract)

    @cached_property
    def regex(self) -> re.Pattern[str] | None:
        return None if self.extract is None else re.compile(self.extract, re.DOTALL)


def regex_faults(name: str, pattern: str) -> Iterator[str]:
    """What is wrong with a regular expression that an option is."""
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{name}={pattern!r} is no regular expression ({error}); correct it"


class Exact:
    """Of the answer behind its thinking."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = validated(ExactOptions, options, prefix="task.reward.options.")

    def check(self, prompt: Prompt) -> None:
        try:
            reference_answers(prompt)
        except DataError as error:
            raise ConfigError(f"task.reward: {error}") from None

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        options, answer = self._options, final_answer(turns)
        references = [self._plain(one) for one in reference_answers(prompt)]
        if options.regex is not None:
            matches = list(options.regex.finditer(answer))
            if not matches:
                return options.wrong
            answer = matches[-1].group(1 if options.regex.groups else 0) or ""
        return options.right if self._plain(answer) in references else options.wrong

    def _plain(self, text: str) -> str:
        text = text.strip() if self._options.strip else text
        return text if self._options.case else text.casefold()
