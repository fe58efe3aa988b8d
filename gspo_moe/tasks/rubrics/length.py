"""The reward `length`: a penalty from 0 down to -1 for answers of another length than wanted, in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import PositiveInt

from gspo_moe.config.validation import validated
from gspo_moe.section import Section
from gspo_moe.types import Conversation, Prompt


class LengthOptions(Section):
    """Either `target`, or `max_tokens` with `buffer`.

    target: tokens of all turns together; -|tokens - target| / target, at least -1, after L1 (arXiv 2503.04697, equation
    1, whose alpha is 1 / target). max_tokens, buffer: of the longest turn; 0 up to max_tokens - buffer, from there a
    straight line to -1 at max_tokens, DAPO's soft over-long punishment (arXiv 2503.14476, equation 13).
    """

    target: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    buffer: PositiveInt | None = None

    def faults(self) -> Iterator[str]:
        if (self.target is None) == (self.max_tokens is None):
            yield "needs one of target and max_tokens; set one of them"
        if (self.max_tokens is None) != (self.buffer is None):
            yield "max_tokens and buffer go together; set both"
        if self.max_tokens is not None and self.buffer is not None and self.buffer > self.max_tokens:
            yield f"buffer={self.buffer} exceeds max_tokens={self.max_tokens}; lower it"


class Length:
    """By `Turn.tokens` of the policy's turns, end tokens included."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = validated(LengthOptions, options, prefix="task.reward.options.")

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        target, limit, buffer = self._options.target, self._options.max_tokens, self._options.buffer
        tokens = [turn.tokens for turn in turns if turn.role == "policy"]
        if target is not None:
            return max(-1.0, -abs(sum(tokens) - target) / target)
        assert limit is not None
        assert buffer is not None
        return min(0.0, max(-1.0, (limit - buffer - max(tokens, default=0)) / buffer))
