"""Transformer Engine's layers for the model, on GPUs in 16 bits; imported only where they can run.

Linear layers, norms and grouped-GEMM experts are megatron-core's wrappers of Transformer Engine. Norms stay modules of
their own, not fused into the linear layers behind them, so that parameters have the same names on every backend but
for the experts. Core attention stays ours (`model.attention`): megatron-core's would bring its own rotary embedding,
and decoding needs our cache; only the kernel within sequences is Transformer Engine's, in its THD format.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.enums import AttnMaskType

from gspo_moe.model.attention import AttentionParams, CachedAttention


class TEPackedAttention(CachedAttention, TEDotProductAttention):
    """Attends within sequences through Transformer Engine's variable-length kernels."""

    def _within_sequences(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        # By its class: this instance's own `forward` is the one that called.
        out: torch.Tensor = TEDotProductAttention.forward(
            self, query_THD, key_TGD, value_TGD, None, AttnMaskType.causal, packed_seq_params=params
        )
        return out


class SpecProvider(TESpecProvider):
    """megatron-core's choice of Transformer Engine layers with our core attention."""

    def core_attention(self) -> type:
        return TEPackedAttention
