"""megatron-core's top-k router, made to keep padding tokens from every expert and to be watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

# The router, its logits and its choice, both [tokens, experts].
Observer = Callable[["PaddingAwareRouter", torch.Tensor, torch.Tensor], None]


class PaddingAwareRouter(TopKRouter):
    """megatron-core leaves padding out of the auxiliary loss only; here it is dispatched nowhere either.

    observers: called with every choice made, recomputation's included. has_padding: whether the last one left any
    token without experts. hidden_PH, logits_PE: what is routed, and what the router makes of it, while a choice is made
    and observers are called; weights_PE: while they are, the choice's gate weights. All [tokens, ...].
    """

    observers: tuple[Observer, ...] = ()
    has_padding = False
    hidden_PH: torch.Tensor | None = None
    logits_PE: torch.Tensor | None = None
    weights_PE: torch.Tensor | None = None

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        self.hidden_PH = input.detach().reshape(-1, input.shape[-1])
        logits: torch.Tensor = super().gating(input)
        return logits

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice [tokens, experts] of each token; padding_mask: bool, True on padding."""
        self.has_padding = padding_mask is not None
        self.logits_PE = logits.detach().reshape(-1, logits.shape[-1])
        try:
            with _top_k_in_order(self):
                probs, routing_map = super().routing(logits, padding_mask)
            if hasattr(self.router_replay, "gates"):
                probs = self.router_replay.gates(probs)
            self.weights_PE = probs.detach()
            for observer in self.observers:
                observer(self, self.logits_PE, routing_map)
        finally:
            self.hidden_PH = self.logits_PE = self.weights_PE = None
        if padding_mask is None:
            return probs, routing_map
        real = ~padding_mask.reshape(-1, 1)
        return probs * real, routing_map & real


class _InOrder:
    """Stands where a RouterReplay would: the router's own choice, best expert first."""

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        order = values.argsort(dim=1, descending=True)
        return values.gather(1, order), indices.gather(1, order)


@contextlib.contextmanager
def _top_k_in_order(router: TopKRouter) -> Iterator[None]:
    """From 0.19 on the K chosen are in order only where gradients are on, and gate weights are rounded in that order.

    Old log-probs, taken without gradients, would then differ from those of the training forward at equal weights.
    """
    if router.router_replay is not None or torch.is_grad_enabled():
        yield
        return
    router.router_replay = _InOrder()
    try:
        yield
    finally:
        router.router_replay = None


def freeze_routers(chunks: Iterable[torch.nn.Module]) -> None:
    """Leaves the router weights out of every later gradient and optimizer."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.requires_grad_(False)
