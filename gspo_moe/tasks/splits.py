"""Train, sft and eval prompts that do not meet.

Every (seed, split, index, attempt) has a random stream of its own. One text in `HELD_OUT_ONE_IN`, chosen by the hash
of the text alone, belongs to eval, and all others to train and sft. A prompt whose text is on the wrong side is thrown
away and drawn again. So no text that eval gives is ever given to train or sft, whatever the seed, the process or the
number of prompts drawn. Train and sft are independent streams that may repeat a text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import blake2b
from random import Random
from typing import Any, ClassVar

from gspo_moe.errors import ConfigError
from gspo_moe.types import Prompt

SPLITS = ("train", "sft", "eval")
HELD_OUT_ONE_IN = 4
MAX_DRAWS = 500

MakeEntry = Callable[[Random], tuple[str, dict[str, Any]]]


def is_held_out(text: str) -> bool:
    """True where a prompt's text belongs to eval."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) % HELD_OUT_ONE_IN == 0


def draw_prompt(task: str, seed: int, split: str, index: int, make_entry: MakeEntry) -> Prompt:
    """Prompt `index` of `split`; `make_entry` turns a random stream into (text, reference).

    Raises ConfigError for an unknown split, and when the task has too few different prompts to hold any out.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of task {task}; use one of {', '.join(SPLITS)}")
    for attempt in range(MAX_DRAWS):
        text, reference = make_entry(Random(f"{seed}/{split}/{index}/{attempt}"))
        if is_held_out(text) == (split == "eval"):
            return Prompt(uid=f"{split}/{index}", text=text, task=task, reference=reference)
    raise ConfigError(
        f"{MAX_DRAWS} draws of task {task} gave no prompt for {split}: there are too few different ones to hold some "
        "out for evaluation; widen task.options"
    )


class DrawnPrompts(ABC):
    """Prompts without end, as `_entry` makes them of a random stream."""

    name: ClassVar[str]

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def prompt(self, split: str, index: int) -> Prompt:
        return draw_prompt(self.name, self._seed, split, index, self._entry)

    def size(self, split: str) -> None:
        return None

    @abstractmethod
    def _entry(self, random: Random) -> tuple[str, dict[str, Any]]:
        """Text and reference."""
