"""Rubrics made of others: a weighted sum with its terms as parts, and another rubric for some prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_moe.errors import DataError, RewardError
from gspo_moe.tasks.protocol import Item, Rubric
from gspo_moe.tasks.rewards import as_reward, check_reward, given_rewards, is_batched, prepare
from gspo_moe.types import Conversation, Prompt, Reward


@dataclass(frozen=True)
class Term:
    """name: of its part in the log, no two alike."""

    name: str
    rubric: Rubric
    weight: float = 1.0


class WeightedSum:
    """The sum of weight times reward over its terms; parts are the terms' rewards without weights.

    A term that has parts of its own logs them as `term/part`.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = tuple(terms)
        if any(is_batched(term.rubric) for term in terms):
            self.rewards = self._rewards

    def check(self, prompt: Prompt) -> None:
        for term in self._terms:
            check_reward(term.rubric, prompt)

    def prepare(self) -> None:
        for term in self._terms:
            prepare(term.rubric)

    def reward(self, prompt: Prompt, turns: Conversation) -> dict[str, float]:
        return self._total([term.rubric.reward(prompt, turns) for term in self._terms])

    def _rewards(self, items: Sequence[Item]) -> list[dict[str, float]]:
        of_terms = [given_rewards(term.rubric, items) for term in self._terms]
        return [self._total(given) for given in zip(*of_terms, strict=True)]

    def _total(self, given: Sequence[Any]) -> dict[str, float]:
        total, parts = 0.0, dict[str, float]()
        for term, value in zip(self._terms, given, strict=True):
            reward = as_reward(value)
            if not isinstance(reward, Reward):
                raise DataError(f"{term.name}: {reward}")
            total += term.weight * reward.total
            parts[term.name] = reward.total
            parts |= {f"{term.name}/{part}": number for part, number in reward.parts.items()}
        return {"reward": total, **parts}


class ByPrompt:
    """The rubric that `reference["reward"]` names, for prompts that have it; another for the others."""

    def __init__(self, rubric: Rubric, named: Mapping[str, Rubric]) -> None:
        self._rubric, self._named = rubric, dict(named)
        if any(map(is_batched, self._all())):
            self.rewards = self._rewards

    def check(self, prompt: Prompt) -> None:
        check_reward(self._of(prompt), prompt)

    def prepare(self) -> None:
        for rubric in self._all():
            prepare(rubric)

    def reward(self, prompt: Prompt, turns: Conversation) -> Any:
        return self._of(prompt).reward(prompt, turns)

    def _rewards(self, items: Sequence[Item]) -> list[Any]:
        names = [prompt.reference.get("reward") for prompt, _ in items]
        found: dict[int, Any] = {}
        for name in dict.fromkeys(names):
            indices = [index for index, one in enumerate(names) if one == name]
            of_name = [items[index] for index in indices]
            given = given_rewards(self._of(of_name[0][0]), of_name)
            found.update(zip(indices, given, strict=True))
        return [found[index] for index in range(len(items))]

    def _all(self) -> list[Rubric]:
        return [self._rubric, *self._named.values()]

    def _of(self, prompt: Prompt) -> Rubric:
        name = prompt.reference.get("reward")
        if name is not None and name not in self._named:
            raise RewardError(f"{prompt.uid} names the reward {name}, which no file of task.data does; name it there")
        return self._rubric if name is None else self._named[name]
