"""Samples under way and the rows of the cache that they have.

Shape letters: A MoE layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gspo_moe.model.cache import KVCache
from gspo_moe.rollout.engine import Request
from gspo_moe.types import Rollout


@dataclass
class SampleUnderWay:
    """One sample under way, the batch's `number`th; `routes`: the experts of every token fed so far.

    row: its row of the cache.
    """

    request: Request
    sample_index: int
    number: int
    row: int
    response_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    routes: list[torch.Tensor] = field(default_factory=list)

    @property
    def next_position(self) -> int:
        """Of its newest token, which is not fed yet."""
        return len(self.request.prompt_ids) + len(self.response_ids) - 1

    def rollout(self, version: int) -> Rollout:
        return Rollout(
            uid=self.request.uid,
            sample_index=self.sample_index,
            token_ids=(*self.request.prompt_ids, *self.response_ids),
            policy_mask=(0,) * len(self.request.prompt_ids) + (1,) * len(self.response_ids),
            log_probs=tuple(self.log_probs),
            finish="stop" if self.finished else "length",
            versions=((version, len(self.response_ids)),),
            routes=self.routes[0] if self.routes else None,
        )


def in_first_rows(cache: KVCache, active: list[SampleUnderWay]) -> list[SampleUnderWay]:
    """The sequences by row, after those of the last rows have taken the rows that finished ones left."""
    free = set(range(len(active))) - {sequence.row for sequence in active}
    moving = [sequence for sequence in active if sequence.row >= len(active)]
    if moving:
        used = max(sequence.next_position for sequence in moving)
        cache.copy([sequence.row for sequence in moving], sorted(free), used)
        for sequence, row in zip(moving, sorted(free), strict=True):
            sequence.row = row
    return sorted(active, key=lambda sequence: sequence.row)
