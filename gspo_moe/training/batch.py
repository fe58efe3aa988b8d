"""The seam of a step: what it learns from, wherever that came from.

Shape letters: A MoE layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_moe.types import RolloutGroup, TrainingSample


@dataclass(frozen=True)
class Batch:
    """What `learn` takes; the same on every rank but for `samples`' routes, which their owners alone have.

    groups: those to learn from, in the order of the prompts. samples: their rollouts, in the same order.
    owners: for each sample, the rank of `Groups.data_context` that has its routes.
    metrics: of everything that was sampled for it. taken: uids of all prompts that it used up.
    """

    groups: tuple[RolloutGroup, ...]
    samples: tuple[TrainingSample, ...]
    owners: tuple[int, ...]
    metrics: dict[str, float]
    versions: frozenset[int]
