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
                for number, expert in enumerate(layer.mlp.experts.local_experts):
                    place = layer.layer_number - 1, model.groups.expert.rank() * local + number
                    expert.register_forward_pre_hook(self._count(*place))

    def _count(self, layer: int, expert: int) -> Callable[..., None]:
        def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self.load[layer, expert] += inputs[0].shape[0]

        return count
