"""A task of one's own, of several turns: guess a number from 1 to 9, told each time whether it is higher or lower.

gspo-moe train CONFIG.yaml task.name=guess_number:guess_number   # started in this folder, or with it on PYTHONPATH
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.types import Conversation, Prompt

SIZES = {"train": None, "sft": None, "eval": 9}


class GuessNumber:
    """Prompts, environment and rubric in one; `tries`: guesses that a conversation has room for."""

    def __init__(self, seed: int, tries: int = 3) -> None:
        self._seed, self._tries = seed, tries

    def size(self, split: str) -> int | None:
        return SIZES[split]

    def prompt(self, split: str, index: int) -> Prompt:
        number = index + 1 if split == "eval" else Random(f"{self._seed}/{split}/{index}").randint(1, 9)
        return Prompt(f"{split}/{index}", "1-9?", "guess_number", {"number": number})

    def reset(self, prompt: Prompt) -> None:
        return None

    def step(self, prompt: Prompt, turns: Conversation) -> str | None:
        guess, guesses = last_answer(turns), sum(turn.role == "policy" for turn in turns)
        if guesses == self._tries or not guess.isdecimal() or int(guess) == prompt.reference["number"]:
            return None
        return "higher?" if int(guess) < prompt.reference["number"] else "lower?"

    def reward(self, prompt: Prompt, turns: Conversation) -> Mapping[str, float]:
        guess = last_answer(turns)
        right = guess.isdecimal() and int(guess) == prompt.reference["number"]
        return {"right": float(right), "form": 0.1 * guess.isdecimal()}


def guess_number(options: Mapping[str, Any], seed: int) -> Task:
    game = GuessNumber(seed, **options)
    return Task("guess_number", prompts=game, rubric=game, environment=game)
