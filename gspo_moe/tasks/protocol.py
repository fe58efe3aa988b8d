"""What a task is to the rest of the program."""

from __future__ import annotations

from typing import Protocol

from gspo_moe.types import Prompt


class Task(Protocol):
    """An endless, reproducible source of prompts that can score their answers.

    `prompt` is a pure function of the task's options, its seed, `split` and `index`, in every process and run. Splits
    are "train", "sft" and "eval"; no text that eval can give is ever given by the others (see `tasks.splits`).
    """

    @property
    def name(self) -> str: ...

    def prompt(self, split: str, index: int) -> Prompt:
        """Prompt number `index` (from 0, without end) of `split`. Raises ConfigError where no such prompt exists."""
        ...

    def demonstration(self, prompt: Prompt) -> str:
        """An answer to learn in supervised training. Raises ConfigError where the task has none (stage sft)."""
        ...

    def score(self, prompt: Prompt, answer: str) -> float:
        """Reward of `answer`, the decoded response without its stop token: normally 0 (wrong) to 1 (right)."""
        ...
