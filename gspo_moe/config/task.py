"""The section `task`: what is asked, and how answers are rewarded. Torch-free, and light: reward workers import it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from gspo_moe.section import Section


class RewardConfig(Section):
    """Rewards run in worker processes; one that raises, hangs or exceeds 1e6 is counted and gets `failure_reward`.

    allow_all_failed: goes on also where no answer of a step or an evaluation got a reward of its own.
    """

    workers: PositiveInt = 1
    timeout_seconds: PositiveFloat = 10.0
    failure_reward: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    allow_all_failed: bool = False


class TaskConfig(Section):
    name: str = "sort_letters"
    options: dict[str, Any] = Field(default_factory=dict)
    reward: RewardConfig = RewardConfig()
