"""How old the tokens are that a step learns from, and what of its figures goes with their age.

Shape letters: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from gspo_moe.algorithms.lag import LagStatistics
from gspo_moe.parallel.reduce import reduce_statistics
from gspo_moe.routing.comparison import compare_by_lag
from gspo_moe.routing.figures import Figures
from gspo_moe.routing.recorder import Recording
from gspo_moe.routing.shards import StageLayers
from gspo_moe.training.session import Trainer
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class Lags:
    """version: of the policy that the step begins with. updates: versions a step. count: lags from 0 on."""

    version: int
    updates: int
    count: int

    @classmethod
    def of_step(cls, trainer: Trainer) -> Lags | None:
        """None where every token is of the step's own policy, or of one that nobody counts from."""
        config = trainer.session.config
        if not config.rollout.max_staleness:
            return None
        return cls(trainer.progress.policy_version, config.algorithm.mini_batches, config.rollout.max_staleness + 1)

    def of(self, pack: Microbatch) -> torch.Tensor:
        """int64 [T], of each target; -1 off the response."""
        assert pack.versions_T is not None, "samples came without their versions"
        lag_T = (self.version - pack.versions_T).div(self.updates, rounding_mode="floor")
        return torch.where(pack.versions_T >= 0, lag_T, -1)


def routes_by_lag(
    pair: str,
    packs: Sequence[Microbatch],
    recordings: Iterable[tuple[Recording, Recording]],
    lags: Lags,
    layers: StageLayers,
) -> Figures:
    """Slot change and flip rate of a pair of recordings a pack, by lag of the token that followed. Collective."""
    found = [
        compare_by_lag(pack, old, new, lags.of(pack), lags.count, layers)
        for pack, (old, new) in zip(packs, recordings, strict=True)
    ]
    sums = reduce_statistics(reduce(LagStatistics.merge, found), layers.groups.data)
    return Figures({f"routing/{pair}/{name}": value for name, value in sums.to_metrics().items()})
