"""Core attention of ours: packed sequences and KV-cached decoding.

It takes what megatron-core's SelfAttention hands over after the q/k norms, rotates by explicit positions, and attends
within each sequence. Rotation, packing and cache are one code path on every backend, so that rollouts, scoring and
training agree; a backend brings only the kernel that attends within sequences. Here that is torch's
scaled-dot-product attention, since megatron-core's own refuses packed sequences; `model.transformer_engine` has the
other. Invariant: a token's result does not depend on which other sequences share its pack.

Under context parallelism a rank has some tokens of every sequence. Keys and values, rotated where they are, are
gathered over the group, and each stretch of consecutive queries attends to the keys of its sequence up to its own last.
A layer so holds the keys and values of a whole pack, 2 T G D numbers and about as many again in the stretches' order,
while hidden states stay T / ranks; ring exchange would hold less.

Shape letters: T tokens of a pack (of this rank's part of it), N sequences, S longest sequence, H query heads, G
key/value heads, D head size, B rows of the cache, K keys that the stretches see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from gspo_moe.config.architecture import Architecture
from gspo_moe.model.rope import rotary_factors
from gspo_moe.parallel.context import ContextSplit


class KVCache:
    """Keys and values of every layer of this pipeline stage, [B, G, capacity, D] each, made at first use."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self,
        layer: int,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the tokens' keys and values at (row, position); returns the layer's whole buffers."""
        if layer not in self._layers:
            shape = (self.rows, key_TGD.shape[1], self.capacity, key_TGD.shape[2])
            self._layers[layer] = (key_TGD.new_zeros(shape), value_TGD.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[rows_T, :, positions_T] = key_TGD
        values[rows_T, :, positions_T] = value_TGD
        return keys, values

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, in that order; a row may be named more than once to copy it."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        self.rows = rows.numel()


@dataclass
class AttentionParams(PackedSeqParams):
    """What a pack's tokens may see; travels through megatron-core as its `packed_seq_params`.

    cos_TD, sin_TD: rotary factors of each token's position.
    slot_T: where each token lies in an [N, S] grid, flattened. num_sequences: N. longest: S.
    cache, rows_T, positions_T: set when generating; `decode` is True when each row brings one new token;
    `rows_in_order` when rows_T is 0, 1, 2, ..., which spares a copy of the cache.
    context, keys_K: set where the tokens are one rank's part; keys_K: which keys of all ranks of `context`, end to end,
    the stretches of queries see, stretch by stretch. stretches: how many queries and keys each has.
    """

    cos_TD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sin_TD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    slot_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    num_sequences: int = 0
    longest: int = 0
    cache: KVCache | None = None
    rows_T: torch.Tensor | None = None
    positions_T: torch.Tensor | None = None
    decode: bool = False
    rows_in_order: bool = False
    context: dist.ProcessGroup | None = None
    keys_K: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    stretches: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def attention_params(
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    architecture: Architecture,
    *,
    cache: KVCache | None = None,
    rows_T: torch.Tensor | None = None,
    decode: bool = False,
    rows_in_order: bool = False,
) -> AttentionParams:
    """Prepares one pack's attention, once for all layers.

    position_ids_T: int64 [T]. cu_seqlens: int64 [N + 1]. rows_T: int64 [T], each token's row of `cache`.
    """
    cos_TD, sin_TD = rotary_factors(position_ids_T, architecture)
    lengths_N = cu_seqlens.diff()
    bounds = cu_seqlens.to(torch.int32)  # what Transformer Engine takes
    longest = int(lengths_N.max())
    row_T = torch.repeat_interleave(torch.arange(lengths_N.numel(), device=lengths_N.device), lengths_N)
    offset_T = torch.arange(position_ids_T.numel(), device=lengths_N.device) - cu_seqlens[row_T]
    return AttentionParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cos_TD=cos_TD,
        sin_TD=sin_TD,
        slot_T=row_T * longest + offset_T,
        num_sequences=lengths_N.numel(),
        longest=longest,
        cache=cache,
        rows_T=rows_T,
        positions_T=position_ids_T,
        decode=decode,
        rows_in_order=rows_in_order,
    )


def split_attention_params(
    position_ids_T: torch.Tensor, split: ContextSplit, architecture: Architecture
) -> AttentionParams:
    """Prepares the attention of this rank's part of a pack. position_ids_T: int64, of its tokens and the padding."""
    queries, keys, keys_K = split.visible_keys(position_ids_T.numel())
    cos_TD, sin_TD = rotary_factors(position_ids_T, architecture)
    stretches = tuple(queries.diff().tolist()), tuple(keys.diff().tolist())
    return AttentionParams(
        qkv_format="thd",
        cu_seqlens_q=queries.to(torch.int32),
        cu_seqlens_kv=keys.to(torch.int32),
        max_seqlen_q=max(stretches[0]),
        max_seqlen_kv=max(stretches[1]),
        cos_TD=cos_TD,
        sin_TD=sin_TD,
        context=split.group,
        keys_K=keys_K,
        stretches=stretches,
    )


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split convention of Qwen3 (RoFormer, arXiv 2104.09864, eq. 34)."""
    left, right = x_THD.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return x_THD * cos_TD[:, None].to(x_THD.dtype) + turned * sin_TD[:, None].to(x_THD.dtype)


class CachedAttention:
    """megatron-core's core-attention interface on packed `[T, heads, D]` tensors, but for the kernel."""

    layer_number: int

    def forward(
        self,
        query_THD: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: AttentionParams | None = None,
    ) -> torch.Tensor:
        assert isinstance(packed_seq_params, AttentionParams), "every forward goes through model.forward"
        params = packed_seq_params
        query_THD = rotate(query_THD, params.cos_TD, params.sin_TD)
        key_TGD = rotate(key_TGD, params.cos_TD, params.sin_TD)
        if params.cache is not None:
            assert params.rows_T is not None
            assert params.positions_T is not None
            keys, values = params.cache.write(self.layer_number, params.rows_T, params.positions_T, key_TGD, value_TGD)
            if params.decode:
                return self._decode(query_THD, keys, values, params)
        if params.context is None:
            return self._within_sequences(query_THD, key_TGD, value_TGD, params)
        both_T2GD = torch.stack([key_TGD, value_TGD], dim=1)
        every_2GD: torch.Tensor = gather_from_sequence_parallel_region(both_T2GD, group=params.context)
        key_KGD, value_KGD = every_2GD[params.keys_K].unbind(dim=1)
        return self._over_stretches(query_THD, key_KGD, value_KGD, params)

    def _within_sequences(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Causal attention of each sequence to itself: [T, H * D], scores divided by the root of D."""
        raise NotImplementedError

    def _over_stretches(
        self, query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Attention of each stretch to its own keys, [T, H * D]: its last query sees them all, one before all but one.

        cu_seqlens_q and cu_seqlens_kv of `params` bound the stretches.
        """
        raise NotImplementedError

    def _decode(
        self, query_THD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        assert params.positions_T is not None
        assert params.rows_T is not None
        used = int(params.positions_T.max()) + 1
        visible = torch.arange(used, device=query_THD.device)[None] <= params.positions_T[:, None]
        rows: Any = slice(query_THD.shape[0]) if params.rows_in_order else params.rows_T
        out = F.scaled_dot_product_attention(
            query_THD[:, :, None],
            keys[rows, :, :used],
            values[rows, :, :used],
            attn_mask=visible[:, None, None],
            enable_gqa=query_THD.shape[1] != keys.shape[1],
        )
        return out.reshape(query_THD.shape[0], -1)


class PackedAttention(CachedAttention, torch.nn.Module):
    """Attends within sequences through torch's scaled-dot-product attention on a padded grid."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number

    def _within_sequences(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        # Causal attention never looks right, so the grid's empty slots behind short sequences are never seen.
        grid = (params.num_sequences, params.longest)

        def spread(x: torch.Tensor) -> torch.Tensor:
            flat = x.new_zeros(grid[0] * grid[1], *x.shape[1:]).index_copy(0, params.slot_T, x)
            return flat.view(*grid, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            spread(query_THD),
            spread(key_TGD),
            spread(value_TGD),
            is_causal=True,
            enable_gqa=query_THD.shape[1] != key_TGD.shape[1],
        )
        return out.transpose(1, 2).reshape(grid[0] * grid[1], -1)[params.slot_T]

    def _over_stretches(
        self, query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Takes a mask of queries x keys for each stretch, and on GPUs its scores too, heads x queries x keys: for
        contexts that fill a GPU take Transformer Engine."""
        queries, keys = params.stretches
        parts = []
        for query, key, value in zip(query_THD.split(queries), key_KGD.split(keys), value_KGD.split(keys), strict=True):
            visible = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
            out = F.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=visible.tril(len(key) - len(query)),
                enable_gqa=query.shape[1] != key.shape[1],
            )
            parts.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)
