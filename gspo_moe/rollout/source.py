"""Where rollouts come from: the policy's own engine, or a bank of frozen ones.

A step asks for answers to prompts and takes what has come: in any order, later than asked, of any policy version. Each
rank gets a share of the groups; what it got and the others did not are their routes, which are too large to be
gathered (`parallel.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gspo_moe.config.schema import Config
from gspo_moe.observability.timers import Timers
from gspo_moe.rollout.answers import Answerer
from gspo_moe.rollout.bank import Bank
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.types import Prompt, RolloutGroup


class RolloutSource(Protocol):
    def ask(self, prompts: Sequence[Prompt], step: int) -> None:
        """Wants each of these prompts answered; every rank asks for the same. step: steps taken so far, a seed."""
        ...

    def take(self) -> list[RolloutGroup]:
        """This rank's share of the groups that have come since, with their rewards, at least one on some rank while
        any asked for is to come. Collective over all ranks.
        """
        ...


class EngineSource:
    """Answers of the policy as it is when they are taken."""

    def __init__(self, answerer: Answerer, config: Config, stop_ids: frozenset[int], timers: Timers) -> None:
        self._answerer, self._config, self._stop_ids, self._timers = answerer, config, stop_ids, timers
        self._asked: list[tuple[int, list[Prompt]]] = []

    def ask(self, prompts: Sequence[Prompt], step: int) -> None:
        self._asked.append((step, list(prompts)))

    def take(self) -> list[RolloutGroup]:
        asked, self._asked = self._asked, []
        return [group for step, prompts in asked for group in self._answers(prompts, step)]

    def _answers(self, prompts: list[Prompt], step: int) -> list[RolloutGroup]:
        with self._timers("rollout"):
            samples, params = self._config.rollout.samples_per_prompt, self._sampling(step)
            share = self._answerer.generate(prompts, samples, params, ahead=True)
        with self._timers("reward"):
            return self._answerer.reward(share)

    def _sampling(self, step: int) -> SamplingParams:
        rollout = self._config.rollout
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_response_tokens=rollout.max_response_tokens,
            stop_ids=self._stop_ids,
            seed=f"{self._config.seed}/{step}",
            report_routes=self._config.routing.reports_engine_routes,
        )


class BankSource:
    """The frozen answers of a bank, of which each rank takes its share."""

    def __init__(self, bank: Bank, share: Callable[[Sequence[Prompt]], Sequence[Prompt]]) -> None:
        self._bank, self._share = bank, share
        self._asked: list[Prompt] = []

    def ask(self, prompts: Sequence[Prompt], step: int) -> None:
        self._asked += self._share(prompts)

    def take(self) -> list[RolloutGroup]:
        asked, self._asked = self._asked, []
        return self._bank.answers(asked)
