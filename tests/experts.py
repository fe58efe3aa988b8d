"""What experts of a model really receive, seen from inside, whatever the router says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gspo_moe.model.build import Model


class TokensSeen:
    """Counts the tokens that enter each expert of this rank from now on: load [A, E], zero where others hold them."""

    def __init__(self, model: Model) -> None:
        sizes = model.architecture
        self.load = torch.zeros(sizes.num_hidden_layers, sizes.num_experts, dtype=torch.int64)
        local = sizes.num_experts // model.groups.layout.expert
        for chunk in model.gpt_chunks:
            for layer in chunk.decoder.layers:
                first = model.groups.expert.rank() * local
                mine = self.load[layer.layer_number - 1, first : first + local]
                layer.mlp.experts.register_forward_pre_hook(_count_into(mine))


def _count_into(load_E: torch.Tensor) -> Callable[..., None]:
    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows, tokens_per_expert, _probs = inputs
        assert tokens_per_expert.sum() == len(rows)
        load_E.add_(tokens_per_expert)

    return count
