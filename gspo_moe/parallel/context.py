"""Sequences whose tokens are split over the context-parallel group: who holds which token, and sums over the group.

The split is megatron-core's: each sequence of a pack is cut into twice as many chunks as there are ranks, and a rank
takes a chunk from the front and its mirror image from the back, so that causal attention costs every rank the same.
megatron-core pads a sequence until the chunks are equal; here the chunks are those, less the padding.

Shape letters: T tokens of a pack, C this rank's tokens of it, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


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


@dataclass(frozen=True)
class ContextSplit:
    """Which tokens of one pack this rank has.

    What is known of whole packs (targets, old log-probs, routes to replay) becomes this rank's by `local`; what this
    rank found becomes the pack's by `whole`.
    cu_seqlens: int64 [N + 1], bounds of the whole pack's sequences.
    group: the ranks that share them; None where this rank has all tokens.
    total: tokens of the pack, where the caller knows, which spares a wait for the device.
    """

    cu_seqlens: torch.Tensor
    group: dist.ProcessGroup | None = None
    total: int | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @cached_property
    def rank_T(self) -> torch.Tensor:
        """The rank that has each token, int64 [T]."""
        return context_rank(self.cu_seqlens, self.size)

    @cached_property
    def _here(self) -> tuple[torch.Tensor, torch.Tensor]:
        return split_context(self.cu_seqlens, self.size, self._rank)

    @property
    def tokens_C(self) -> torch.Tensor:
        """This rank's tokens of the pack, int64, ascending."""
        return self._here[0]

    @property
    def bounds(self) -> torch.Tensor:
        """cu_seqlens of this rank's tokens, int64 [N + 1]."""
        return self.cu_seqlens if self.size == 1 else self._here[1]

    @cached_property
    def counts(self) -> list[int]:
        """How many tokens each rank has."""
        if self.size == 1:
            return [int(self.cu_seqlens[-1]) if self.total is None else self.total]
        found: list[int] = self.rank_T.bincount(minlength=self.size).tolist()
        return found

    @property
    def num_local(self) -> int:
        return self.counts[self._rank]

    def local(self, values_T: torch.Tensor) -> torch.Tensor:
        """This rank's [C, ...] of the whole pack's [T, ...]."""
        return values_T if self.size == 1 else values_T[self.tokens_C]

    def whole(self, values_C: torch.Tensor) -> torch.Tensor:
        """The whole pack's [T, ...] from each rank's [C, ...], without gradient. Collective over the group."""
        if self.size == 1:
            return values_C
        missing = max(self.counts) - len(values_C)
        padded = F.pad(values_C.detach(), (0, 0) * (values_C.ndim - 1) + (0, missing)).contiguous()
        parts = [torch.empty_like(padded) for _ in self.counts]
        # As bytes: gloo knows no int16, which routes among many experts have.
        dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=self.group)
        return join_context([part[:n] for part, n in zip(parts, self.counts, strict=True)], self.cu_seqlens)

    def visible_keys(self, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which keys this rank's queries may see, among those of all ranks, gathered end to end.

        padded: tokens of each rank with the padding behind its own. Returns bounds of stretches of consecutive tokens
        among this rank's `padded` queries and among their keys, both int64 [stretches + 1], and where each of those
        keys lies, int64. A stretch's keys are its sequence's from the start to the stretch's own last, so that
        causality is aligned at the end: the last query sees every key. Over long sequences they are at most
        1 + 1 / (2 ranks) times the pack's tokens. Padding is a stretch that sees itself.
        """
        device = self.cu_seqlens.device
        place_T = torch.empty_like(self.rank_T)
        for rank, count in enumerate(self.counts):
            place_T[self.rank_T == rank] = rank * padded + torch.arange(count, device=device)
        first_T = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff())
        tokens_C = self.tokens_C
        before_C = torch.cat([tokens_C.new_full((1,), -2), tokens_C[:-1]])
        begins = ((tokens_C != before_C + 1) | (tokens_C == first_T[tokens_C])).nonzero()[:, 0]
        queries = torch.cat([begins, begins.new_tensor([self.num_local])])
        ends = tokens_C[queries[1:] - 1] + 1
        keys = [place_T[start:end] for start, end in zip(first_T[ends - 1].tolist(), ends.tolist(), strict=True)]
        if self.num_local < padded:
            mine = self._rank * padded
            keys.append(torch.arange(mine + self.num_local, mine + padded, device=device))
            queries = torch.cat([queries, queries.new_tensor([padded])])
        lengths = torch.tensor([0, *map(len, keys)], device=device)
        return queries, lengths.cumsum(0), torch.cat(keys)


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
