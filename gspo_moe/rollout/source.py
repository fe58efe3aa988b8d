"""Where rollouts come from: the policy's own engine, or a bank of frozen ones.

A step asks for answers to prompts and takes what has come: in any order, later than asked, of any policy version. Each
rank gets a share of the groups; what it got and the others did not are their routes, which are too large to be
gathered (`parallel.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Running:
    """What there is of answers under way. oldest: the first policy version of its tokens; None while there is none."""

    oldest: int | None
    tokens: int


class AheadSource(RolloutSource, Protocol):
    """One that goes on with what it was asked while nobody waits for it."""

    def running(self) -> dict[str, Running]:
        """Of every rank's prompts under way, by uid. Collective."""
        ...

    def give_up(self, uids: Sequence[str]) -> None:
        """Wants no answers to these prompts, as far as this rank has any that are not taken."""
        ...

    def close(self) -> None:
        """Gives everything up."""
        ...


def training_params(config: Config, stop_ids: frozenset[int], step: int) -> SamplingParams:
    """How training samples after so many steps."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_response_tokens=rollout.max_response_tokens,
        stop_ids=stop_ids,
        seed=f"{config.seed}/{step}",
        report_routes=config.routing.reports_engine_routes,
    )


class EngineSource:
    """Answers of the policy as it is when they are taken."""

    def __init__(self, answerer: Answerer, config: Config, stop_ids: frozenset[int], timers: Timers) -> None:
        self._answerer, self.config, self._stop_ids, self._timers = answerer, config, stop_ids, timers
        self._asked: list[tuple[int, list[Prompt]]] = []

    def ask(self, prompts: Sequence[Prompt], step: int) -> None:
        self._asked.append((step, list(prompts)))

    def take(self) -> list[RolloutGroup]:
        asked, self._asked = self._asked, []
        return [group for step, prompts in asked for group in self._answers(prompts, step)]

    def _answers(self, prompts: list[Prompt], step: int) -> list[RolloutGroup]:
        servers = self.config.rollout.engine != "megatron"
        with self._timers("rollout"), self._timers("waiting") if servers else nullcontext():
            samples = self.config.rollout.samples_per_prompt
            params = training_params(self.config, self._stop_ids, step)
            share = self._answerer.generate(prompts, samples, params, ahead=True)
        with self._timers("reward"):
            return self._answerer.reward(share)


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
