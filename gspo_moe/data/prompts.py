"""Prompts in order, with a position that a checkpoint can hold."""

from __future__ import annotations

from typing import Protocol

from gspo_moe.types import Prompt


class Prompts(Protocol):
    """Anything that gives prompt `index` of `split`, always the same one."""

    def prompt(self, split: str, index: int) -> Prompt: ...


class PromptSource:
    """Gives the prompts of one split in order; `position`, the next one's index, is all of its state."""

    def __init__(self, prompts: Prompts, split: str, position: int = 0) -> None:
        self._prompts = prompts
        self._split = split
        self.position = position

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        start = self.position
        self.position += count
        return [self._prompts.prompt(self._split, index) for index in range(start, start + count)]
