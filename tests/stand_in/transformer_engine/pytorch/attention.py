from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from transformer_engine.pytorch.module import _Module


def _forgive_missing_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
    for key in list(incompatible_keys.missing_keys):
        if "core_attention._extra_state" in key:
            incompatible_keys.missing_keys.remove(key)


class DotProductAttention(_Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0
        assert softmax_scale is None
        assert num_gqa_groups is not None
        self.heads, self.groups, self.head_size = num_attention_heads, num_gqa_groups, kv_channels
        self.layer_number = layer_number
        self.register_load_state_dict_post_hook(_forgive_missing_state)

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: None = None,
        cu_seqlens_kv_padded: None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> torch.Tensor:
        assert qkv_format == "thd"
        assert attn_mask_type in ("padding_causal", "padding_causal_bottom_right")
        assert query_layer.shape[1:] == (self.heads, self.head_size)
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.groups, self.head_size)
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_kv == int(cu_seqlens_kv.diff().max())
        if attn_mask_type == "padding_causal":
            assert torch.equal(cu_seqlens_q, cu_seqlens_kv), "causality is aligned at the start"
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
        assert queries[-1] == len(query_layer), "what lies beyond the last sequence is undefined"
        assert keys[-1] == len(key_layer)
        parts = [
            self._one_sequence(query_layer[a:b], key_layer[c:d], value_layer[c:d])
            for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True)
        ]
        return torch.cat(parts).reshape(len(query_layer), -1)

    def _one_sequence(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        repeats = self.heads // self.groups
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / self.head_size**0.5
        future = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(dim=-1), value)
