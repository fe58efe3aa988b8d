"""Transformer Engine's layers for the model, on GPUs in 16 bits; imported only where they can run.

Linear layers, norms and grouped-GEMM experts are megatron-core's wrappers of Transformer Engine. Norms stay modules of
their own, not fused into the linear layers behind them, so that parameters have the same names on every backend but
for the experts. Core attention stays ours (`model.attention`): megatron-core's would bring its own rotary embedding,
and decoding needs our cache; only the kernel within sequences is Transformer Engine's, in its THD format. Under context
parallelism keys are gathered as on every backend: Transformer Engine's own exchange would ask for sequences padded to
equal chunks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from transformer_engine.pytorch import DotProductAttention

from gspo_moe.model.attention import ContextParams, CoreAttention, PackedParams


class TEPackedAttention(CoreAttention, TEDotProductAttention):
    """Attends within sequences through Transformer Engine's variable-length kernels."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **more: Any) -> None:
        config = copy.copy(config)
        config.context_parallel_size = 1  # the keys it gets are all there
        super().__init__(config, *arguments, **more)

    def within_sequences(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: PackedParams
    ) -> torch.Tensor:
        """Causal attention of each sequence to itself, [T, H * D]."""
        # By its class: this instance's own `forward` is the one that called.
        out: torch.Tensor = TEDotProductAttention.forward(
            self, query_THD, key_TGD, value_TGD, None, AttnMaskType.causal, packed_seq_params=params
        )
        return out

    def over_stretches(
        self, query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, params: ContextParams
    ) -> torch.Tensor:
        """Attention of each stretch to its own keys, [T, H * D], causal from their ends."""
        # megatron-core's wrapper has no name for causality that is aligned at the end.
        out: torch.Tensor = DotProductAttention.forward(
            self,
            query_THD,
            key_KGD,
            value_KGD,
            None,
            qkv_format="thd",
            cu_seqlens_q=params.cu_seqlens_q,
            cu_seqlens_kv=params.cu_seqlens_kv,
            max_seqlen_q=params.max_seqlen_q,
            max_seqlen_kv=params.max_seqlen_kv,
            attn_mask_type="padding_causal_bottom_right",
        )
        return out


class SpecProvider(TESpecProvider):
    """megatron-core's choice of Transformer Engine layers with our core attention."""

    def core_attention(self) -> type:
        return TEPackedAttention
