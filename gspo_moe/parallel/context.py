"""Sequences whose tokens are split over the context-parallel group: who holds which token, and sums over the group.

The split is megatron-core's: each sequence of a pack is cut into twice as many chunks as there are ranks, and a rank
takes a chunk from the front and its mirror image from the back, so that causal attention costs every rank the same.
megatron-core pads a sequence until the chunks are equal; here the chunks are those, less the padding.

Shape letters: T tokens of a pack, C this rank's tokens of it, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def context_rank(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """Which of `size` ranks holds each token, int64 [T].

    cu_seqlens: int64 [N + 1]. A chunk is ceil(length / (2 size)) tokens; the last ones of a sequence may be shorter or
    empty, so a short sequence has no token on some ranks.
    """
    lengths_N = cu_seqlens.diff()
    chunk_N = -(-lengths_N // (2 * size))
    offset_T = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    offset_T = offset_T - cu_seqlens[:-1].repeat_interleave(lengths_N)
    chunk_T = offset_T // chunk_N.repeat_interleave(lengths_N)
    return torch.minimum(chunk_T, 2 * size - 1 - chunk_T)


def split_context(cu_seqlens: torch.Tensor, size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a pack that `rank` holds, int64 [C] in ascending order, and their own cu_seqlens, int64 [N + 1]."""
    here_T = context_rank(cu_seqlens, size) == rank
    before = torch.cat([here_T.new_zeros(1, dtype=torch.int64), here_T.cumsum(0)])
    return here_T.nonzero()[:, 0], before[cu_seqlens]


def join_context(parts: Sequence[torch.Tensor], cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The whole pack's values [T, ...] from each rank's [C, ...], in the order of the ranks."""
    rank_T = context_rank(cu_seqlens, len(parts))
    whole = parts[0].new_empty(rank_T.shape + parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank_T == rank] = part
    return whole


class _Sum(torch.autograd.Function):
    """All-reduce forward. Every rank goes on to the same loss, so the gradient of its own summand passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def sum_over(group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    """The sum over the ranks of `group` as `policy_loss` takes it: on every rank, and differentiable."""

    def total(values: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = _Sum.apply(values, group)
        return summed

    return total
