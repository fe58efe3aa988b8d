"""Attention within packs by torch alone: variable-length flash attention where a GPU has it, else a padded grid.

`torch.nn.attention.varlen` takes 16 bits and head sizes that are multiples of 8; all else, fp32 on a GPU included, goes
through scaled-dot-product attention.

Shape letters: T tokens of a pack, Q queries and K keys of a stretch, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from gspo_moe.model.attention import AttentionParams, ContextParams, CoreAttention, PackedParams

# Queries at once where a mask is needed, which so takes this many rows and not a stretch's length.
MASKED_QUERIES = 512


@cache
def flash_attention() -> Callable[..., Any]:
    """torch's `varlen_attn` for any number of key heads that divides the query heads'."""
    # Not above: it brings torch.compile's machinery, a second that a CPU run does without.
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 hands such heads on to the kernel, which takes them; later ones ask.
    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if asks else varlen_attn


class TorchAttention(CoreAttention, torch.nn.Module):
    """Core attention by torch's kernels."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        if torch.cuda.is_available():
            flash_attention()  # so that no import falls into the capture of a graph

    def within_sequences(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: PackedParams
    ) -> torch.Tensor:
        """Causal attention of each sequence to itself, [T, H * D]."""
        attend = varlen if suits_varlen(query_THD) else on_grid
        return attend(query_THD, key_TGD, value_TGD, params)

    def over_stretches(
        self, query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, params: ContextParams
    ) -> torch.Tensor:
        """Attention of each stretch to its own keys, [T, H * D], causal from their ends."""
        if suits_varlen(query_THD):
            return varlen(query_THD, key_KGD, value_KGD, params)
        queries, keys = params.stretches
        stretches = zip(query_THD.split(queries), key_KGD.split(keys), value_KGD.split(keys), strict=True)
        return torch.cat([causal_from_the_end(*stretch) for stretch in stretches])


def suits_varlen(query_THD: torch.Tensor) -> bool:
    """Whether flash attention takes these queries: on a GPU, in 16 bits, at its head sizes."""
    size = query_THD.shape[-1]
    return query_THD.is_cuda and query_THD.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256


def varlen(
    query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """Attention [T, H * D] within the bounds of `params`, causal from the ends of queries and keys."""
    out: Any = flash_attention()(
        query_THD,
        key_KGD,
        value_KGD,
        params.cu_seqlens_q,
        params.cu_seqlens_kv,
        params.max_seqlen_q,
        params.max_seqlen_kv,
        window_size=(-1, 0),
    )
    attended_TX: torch.Tensor = out.flatten(1)
    return attended_TX


def on_grid(
    query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: PackedParams
) -> torch.Tensor:
    """Causal attention [T, H * D] of a pack's sequences, each on a row as long as the longest."""
    # Causal attention never looks right, so the empty slots behind short sequences are never seen.
    grid = (len(params.cu_seqlens_q) - 1, params.max_seqlen_q)

    full = len(query_THD) == grid[0] * grid[1]  # all sequences are as long: the pack is the grid

    def spread(x: torch.Tensor) -> torch.Tensor:
        if full:
            return x.unflatten(0, grid).transpose(1, 2)
        flat = x.new_zeros(grid[0] * grid[1], *x.shape[1:]).index_copy(0, params.grid_slot_T, x)
        return flat.view(*grid, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        spread(query_THD),
        spread(key_TGD),
        spread(value_TGD),
        is_causal=True,
        enable_gqa=query_THD.shape[1] != key_TGD.shape[1],
    )
    out_TX = out.transpose(1, 2).reshape(grid[0] * grid[1], -1)
    return out_TX if full else out_TX[params.grid_slot_T]


def causal_from_the_end(query_QHD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor) -> torch.Tensor:
    """Attention [Q, H * D] of a stretch whose last query sees every key, the one before it all but one, and so on."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query_QHD, key_KGD, value_KGD))
    count = len(query_QHD)
    parts = []
    for start in range(0, count, MASKED_QUERIES):
        end = min(start + MASKED_QUERIES, count)
        seen = len(key_KGD) - count + end
        visible = torch.ones(end - start, seen, dtype=torch.bool, device=query.device).tril(seen - end + start)
        out = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=visible,
            enable_gqa=query_QHD.shape[1] != key_KGD.shape[1],
        )
        parts.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)
