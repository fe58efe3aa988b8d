"""The value head of PPO: one number a token from the last pipeline stage's final hidden states, the trunk shared.

It belongs to training alone: a Hugging Face folder has no place for it, generation never runs it.

Shape letters: P tokens of a pack with padding (under sequence parallelism, this rank's stretch of them), H hidden.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class ValueHead(torch.nn.Module):
    """V = w h, in fp32 whatever the model's dtype; the same weight on every tensor rank."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        # A rank's gradient is that of its own stretch of tokens: megatron-core adds up what bears this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        return torch.mv(hidden_PH.float(), self.weight[0].float())
