"""Core attention of ours: packed sequences, KV-cached decoding, and sequences split over ranks.

It takes what megatron-core's SelfAttention hands over after the q/k norms, rotates by explicit positions, and has the
pack's parameters say who sees what, one class a way: `PackedParams`, `DecodeParams`, `ContextParams`. Rotation, packing
and cache are one code path on every backend, so that rollouts, scoring and training agree; a backend brings only the
kernels that attend within packs: `model.torch_attention`, since megatron-core's own refuses packed sequences, or
`model.transformer_engine`. Invariant: a token's result does not depend on which other sequences share its pack.

Under context parallelism a rank has some tokens of every sequence. Keys and values, rotated where they are, are
gathered over the group, and each stretch of consecutive queries attends to the keys of its sequence up to its own last.
A layer so holds the keys and values of a whole pack, 2 T G D numbers and about as many again in the stretches' order,
while hidden states stay T / ranks; ring exchange would hold less.

Everything that is equal in all layers is made once a pack, and no layer waits for the device.

Shape letters: T tokens of a pack (of this rank's part of it), N sequences, H query heads, G key/value heads, D head
size, K keys that the queries see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from gspo_moe.config.architecture import Architecture
from gspo_moe.kernels import has_layer_kernels, rotary
from gspo_moe.model.cache import CacheSlots
from gspo_moe.model.rope import rotary_factors
from gspo_moe.parallel.context import ContextSplit


class Kernels(Protocol):
    """What a backend brings. Both give [T, H * D], with scores divided by the root of D."""

    layer_number: int

    def within_sequences(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: PackedParams
    ) -> torch.Tensor:
        """Causal attention of each sequence to itself."""

    def over_stretches(
        self, query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, params: ContextParams
    ) -> torch.Tensor:
        """Attention of each stretch to its own keys: its last query sees them all, one before all but one."""


@dataclass(kw_only=True)
class AttentionParams(PackedSeqParams, ABC):
    """What a pack's tokens may see; travels through megatron-core as its `packed_seq_params`.

    cos_TD, sin_TD: rotary factors of each token's position.
    """

    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    qkv_format: str = "thd"

    @abstractmethod
    def attend(
        self, kernels: Kernels, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Attention [T, H * D] of rotated queries to what they may see of these keys and of earlier ones."""


@dataclass(kw_only=True)
class PackedParams(AttentionParams):
    """Each token sees its sequence up to itself.

    cu_seqlens_q bounds the sequences, the longest of which has max_seqlen_q tokens.
    slots: where to keep keys and values for decoding.
    """

    slots: CacheSlots | None = None

    @cached_property
    def grid_slot_T(self) -> torch.Tensor:
        """Where each token lies in a flattened grid of sequences x the longest, int64."""
        bounds, count = self.cu_seqlens_q.long(), len(self.cos_TD)
        rows = torch.arange(len(bounds) - 1, device=bounds.device)
        row_T = torch.repeat_interleave(rows, bounds.diff(), output_size=count)
        return row_T * self.max_seqlen_q + torch.arange(count, device=bounds.device) - bounds[row_T]

    def attend(
        self, kernels: Kernels, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> torch.Tensor:
        if self.slots is not None:
            self.slots.write(kernels.layer_number, key_TGD, value_TGD)
        return kernels.within_sequences(query_THD, key_TGD, value_TGD, self)


@dataclass(kw_only=True)
class DecodeParams(AttentionParams):
    """Each token is the newest of its row of a cache, and sees the row up to itself.

    used: how many of the cache's positions are looked at. bias_T11K: 0 where they are seen, else -inf.
    """

    slots: CacheSlots
    used: int
    bias_T11K: torch.Tensor

    def attend(
        self, kernels: Kernels, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self.slots.write(kernels.layer_number, key_TGD, value_TGD)
        rows: Any = slice(len(query_THD)) if self.slots.in_order else self.slots.rows_T
        # The query heads of one key head lie beside each other as queries do, so that no key is copied for each.
        out = F.scaled_dot_product_attention(
            query_THD.unflatten(1, (keys.shape[1], -1)),
            keys[rows, :, : self.used],
            values[rows, :, : self.used],
            attn_mask=self.bias_T11K,
        )
        return out.flatten(1)


@dataclass(kw_only=True)
class ContextParams(AttentionParams):
    """The tokens are one rank's part of a pack; cu_seqlens_q and cu_seqlens_kv bound stretches of queries and keys.

    keys_K: which keys of all ranks of `group`, end to end, the stretches see, stretch by stretch.
    stretches: how many queries and keys each has.
    """

    group: dist.ProcessGroup
    keys_K: torch.Tensor
    stretches: tuple[tuple[int, ...], tuple[int, ...]]

    def attend(
        self, kernels: Kernels, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> torch.Tensor:
        both_T2GD = torch.stack([key_TGD, value_TGD], dim=1)
        every_2GD: torch.Tensor = gather_from_sequence_parallel_region(both_T2GD, group=self.group)
        key_KGD, value_KGD = every_2GD[self.keys_K].unbind(dim=1)
        return kernels.over_stretches(query_THD, key_KGD, value_KGD, self)


def packed_params(
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    architecture: Architecture,
    dtype: torch.dtype,
    slots: CacheSlots | None = None,
) -> PackedParams:
    """Prepares a pack of whole sequences; waits for the device once.

    position_ids_T: int64. cu_seqlens: int64 [N + 1]. dtype: the queries'. slots: where to keep keys and values.
    """
    cos_TD, sin_TD = _rotary_factors(position_ids_T, architecture, dtype)
    bounds = cu_seqlens.to(torch.int32)  # what variable-length kernels take
    longest = int(cu_seqlens.diff().max())
    return PackedParams(
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cos_TD=cos_TD,
        sin_TD=sin_TD,
        slots=slots,
    )


def decode_params(slots: CacheSlots, used: int, architecture: Architecture, dtype: torch.dtype) -> DecodeParams:
    """Prepares one new token for each row of `slots`; waits for nothing. used: more than any token's position."""
    positions_T = slots.positions_T
    cos_TD, sin_TD = _rotary_factors(positions_T, architecture, dtype)
    hidden_TK = torch.arange(used, device=positions_T.device) > positions_T[:, None]
    bias_TK = torch.zeros_like(hidden_TK, dtype=dtype).masked_fill_(hidden_TK, -torch.inf)
    return DecodeParams(cos_TD=cos_TD, sin_TD=sin_TD, slots=slots, used=used, bias_T11K=bias_TK[:, None, None])


def context_params(
    position_ids_T: torch.Tensor, split: ContextSplit, architecture: Architecture, dtype: torch.dtype
) -> ContextParams:
    """Prepares this rank's part of a pack. position_ids_T: int64, of its tokens and the padding."""
    assert split.group is not None
    queries, keys, keys_K = split.visible_keys(position_ids_T.numel())
    cos_TD, sin_TD = _rotary_factors(position_ids_T, architecture, dtype)
    stretches = tuple(queries.diff().tolist()), tuple(keys.diff().tolist())
    return ContextParams(
        cu_seqlens_q=queries.to(torch.int32),
        cu_seqlens_kv=keys.to(torch.int32),
        max_seqlen_q=max(stretches[0]),
        max_seqlen_kv=max(stretches[1]),
        cos_TD=cos_TD,
        sin_TD=sin_TD,
        group=split.group,
        keys_K=keys_K,
        stretches=stretches,
    )


def _rotary_factors(
    position_ids_T: torch.Tensor, architecture: Architecture, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    cos_TD, sin_TD = rotary_factors(position_ids_T, architecture)
    return cos_TD.to(dtype), sin_TD.to(dtype)


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split convention of Qwen3 (RoFormer, arXiv 2104.09864, eq. 34)."""
    if has_layer_kernels(x_THD, cos_TD, sin_TD):
        return rotary(x_THD, cos_TD, sin_TD)
    left, right = x_THD.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return x_THD * cos_TD[:, None].to(x_THD.dtype) + turned * sin_TD[:, None].to(x_THD.dtype)


class CoreAttention:
    """megatron-core's core-attention interface on packed `[T, heads, D]` tensors, over a backend's `Kernels`."""

    def forward(
        self: Any,
        query_THD: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: AttentionParams | None = None,
    ) -> torch.Tensor:
        assert isinstance(packed_seq_params, AttentionParams), "every forward goes through model.forward"
        cos_TD, sin_TD = packed_seq_params.cos_TD, packed_seq_params.sin_TD
        query_THD, key_TGD = rotate(query_THD, cos_TD, sin_TD), rotate(key_TGD, cos_TD, sin_TD)
        return packed_seq_params.attend(self, query_THD, key_TGD, value_TGD)
