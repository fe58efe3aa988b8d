"""megatron-core's top-k router, made to keep padding tokens from every expert."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter


class PaddingAwareRouter(TopKRouter):
    """megatron-core leaves padding out of the auxiliary loss only; here it is dispatched nowhere either."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice [tokens, experts] of each token; padding_mask: bool, True on padding."""
        probs, routing_map = super().routing(logits, padding_mask)
        if padding_mask is None:
            return probs, routing_map
        real = ~padding_mask.reshape(-1, 1)
        return probs * real, routing_map & real
