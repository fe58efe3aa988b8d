"""The reward `format`: the whole answer, thinking included, has the form that a regular expression says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gspo_moe.config.validation import validated
from gspo_moe.section import Section
from gspo_moe.tasks.protocol import last_answer
from gspo_moe.tasks.rubrics.exact import regex_faults
from gspo_moe.types import Conversation, Prompt

# Thinking and answer between tags, once each, and nothing else (DeepSeek-R1, arXiv 2501.12948, table 1).
THINK_ANSWER = r"<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>"


class FormatOptions(Section):
    """pattern: must match all of the answer, white space around it left out; a dot matches line ends too.

    right, wrong: the rewards.
    """

    pattern: str = THINK_ANSWER
    right: float = 1.0
    wrong: float = 0.0

    def faults(self) -> Iterator[str]:
        yield from regex_faults("pattern", self.pattern)


class Format:
    """Of the policy's last turn."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = validated(FormatOptions, options, prefix="task.reward.options.")
        self._regex = re.compile(self._options.pattern, re.DOTALL)

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        matches = self._regex.fullmatch(last_answer(turns).strip()) is not None
        return self._options.right if matches else self._options.wrong
