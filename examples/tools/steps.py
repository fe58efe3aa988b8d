"""A task of several turns: sums of three numbers with a calculator that does one operation at a time.

The policy asks for 17+35, reads 52, asks for 52-8, reads 44, and answers 44. Only what it says itself is learnt.

gspo-moe train examples/tools/cold_start.yaml && gspo-moe train examples/tools/steps.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.tasks.splits import draw_prompt
from gspo_moe.types import Conversation, Prompt


class Steps:
    """Prompts, demonstrations and rubric; the environment is the calculator of `task.environment`.

    largest: of the numbers in a prompt.
    """

    name = "steps"

    def __init__(self, seed: int, largest: int = 49) -> None:
        self._seed, self._largest = seed, largest

    def size(self, split: str) -> None:
        return None

    def prompt(self, split: str, index: int) -> Prompt:
        prompt = draw_prompt(self.name, self._seed, split, index, self._entry)
        if split != "sft":
            return prompt
        # A demonstration is one turn, so that its prompt is the conversation up to there.
        turns = Random(f"{self._seed}/turns/{index}").randrange(3)
        said = "".join(f"{call}\n{result}\n" for call, result in self._calls(prompt)[:turns])
        return replace(prompt, text=prompt.text + said, reference={**prompt.reference, "turns": turns})

    def demonstration(self, prompt: Prompt) -> str:
        return [*(call for call, _ in self._calls(prompt)), str(self._answer(prompt))][prompt.reference["turns"]]

    def reward(self, prompt: Prompt, turns: Conversation) -> Mapping[str, float]:
        """1 for the answer; `calls` and `errors` are only logged."""
        results = [turn.text.strip() for turn in turns if turn.role == "environment"]
        return {
            "reward": float(last_answer(turns).strip() == str(self._answer(prompt))),
            "calls": float(len(results)),
            "errors": float(sum(result.startswith("error") for result in results)),
        }

    def _entry(self, random: Random) -> tuple[str, dict[str, Any]]:
        first, second, third = (random.randint(1, self._largest) for _ in range(3))
        operators = random.choice("+-") + random.choice("+-")
        text = f"{first}{operators[0]}{second}{operators[1]}{third}="
        return text, {"first": first, "second": second, "third": third, "operators": operators}

    def _calls(self, prompt: Prompt) -> list[tuple[str, int]]:
        """Each call as the policy writes it, and its result."""
        values = prompt.reference
        middle = values["first"] + (values["second"] if values["operators"][0] == "+" else -values["second"])
        return [
            (f"@calculator {values['first']}{values['operators'][0]}{values['second']}", middle),
            (f"@calculator {middle}{values['operators'][1]}{values['third']}", self._answer(prompt)),
        ]

    def _answer(self, prompt: Prompt) -> int:
        values = prompt.reference
        signs = [1 if operator == "+" else -1 for operator in values["operators"]]
        return int(values["first"] + signs[0] * values["second"] + signs[1] * values["third"])


def steps(options: Mapping[str, Any], seed: int) -> Task:
    task = Steps(seed, **options)
    return Task(Steps.name, prompts=task, rubric=task, demonstrate=task.demonstration)
