"""Whole packs against what one tensor rank routes of them, and one pipeline stage's layers against all layers.

Under sequence parallelism each tensor rank routes its own stretch of the padded pack.

Shape letters: C a context rank's tokens of a pack, P those that this rank routes with padding, L this stage's MoE
layers, A all MoE layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_moe.config.architecture import Architecture
from gspo_moe.parallel.groups import Groups


def gather_tokens(values_P: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Every tensor rank's [P, ...] end to end, padding at the end included. Collective over tensor ranks."""
    if not groups.layout.sequence_parallel:
        return values_P
    mine = values_P.contiguous()
    parts = [torch.empty_like(mine) for _ in range(groups.tensor.size())]
    # As bytes: gloo knows no int16, which routes among many experts have.
    dist.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8), group=groups.tensor)
    return torch.cat(parts)


def local_routes(routes_CK: torch.Tensor, count: int, groups: Groups) -> torch.Tensor:
    """This tensor rank's `count` rows of its context rank's routes, int64 [count, K].

    Padding rows get experts 0 to K - 1.
    """
    rows = _own_rows(routes_CK, count, groups).long()
    missing = count - len(rows)
    if not missing:
        return rows
    topk = routes_CK.shape[-1]
    return torch.cat([rows, torch.arange(topk, device=rows.device).expand(missing, topk)])


def local_rows(values_C: torch.Tensor, count: int, groups: Groups) -> torch.Tensor:
    """This tensor rank's `count` rows of any of its context rank's values [C, ...]; padding rows get 0."""
    rows = _own_rows(values_C, count, groups)
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _own_rows(values_C: torch.Tensor, count: int, groups: Groups) -> torch.Tensor:
    start = groups.tensor.rank() * count if groups.layout.sequence_parallel else 0
    return values_C[start : start + count]


@dataclass(frozen=True)
class StageLayers:
    """This pipeline stage's MoE layers among all of the model's. indices: theirs, from 0, in the order of `[L]`."""

    indices: tuple[int, ...]
    architecture: Architecture
    groups: Groups

    def spread(self, values_XL: torch.Tensor) -> torch.Tensor:
        """[X, A, ...] of every pipeline stage's [X, L, ...], which all stages get. Collective over the pipeline."""
        shape = (values_XL.shape[0], self.architecture.num_hidden_layers, *values_XL.shape[2:])
        values_XA = values_XL.new_zeros(shape)
        values_XA[:, list(self.indices)] = values_XL
        if self.groups.pipeline.size() > 1:
            dist.all_reduce(values_XA, group=self.groups.pipeline)
        return values_XA
