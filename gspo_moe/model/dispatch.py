"""megatron-core's token dispatchers with sums in a fixed order, and without a wait for the device where none is needed.

megatron-core adds a token's K expert outputs up with `scatter_add_`, and its gradients with `index_add_`: atomics on a
GPU, so that equal steps give unequal bits. Here the rows of a token are found by the inverse of the order in which
they were laid out, and one reduction adds them up, expert by expert.

Invariants: on the CPU outputs are megatron-core's bit for bit; a token without experts (padding) has no rows and gets
zeros; with one expert rank and no padding the host learns nothing about the routes.

Shape letters: T tokens, E experts, H hidden, N rows by expert, then by token, one for each expert of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from gspo_moe.model.router import PaddingAwareRouter


@dataclass(frozen=True)
class RowOrder:
    """Where the rows of a routing map lie.

    map_ET: bool, the map by expert. expert_N, token_N: int64, whose row it is. by_token_N: int64, the rows by token,
    then by expert. starts_T: int64, where in it a token's begin.
    """

    map_ET: torch.Tensor
    expert_N: torch.Tensor
    token_N: torch.Tensor
    by_token_N: torch.Tensor
    starts_T: torch.Tensor


def row_order(map_TE: torch.Tensor, num_rows: int) -> RowOrder:
    """The order of the map's rows, of which there are `num_rows`; waits for nothing."""
    map_ET = map_TE.T.contiguous()
    expert_N, token_N = map_ET.nonzero_static(size=num_rows).unbind(1)
    rows_T = map_TE.sum(1)
    return RowOrder(map_ET, expert_N, token_N, token_N.argsort(stable=True), rows_T.cumsum(0) - rows_T)


def spread(hidden_TH: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Each token's row for each of its experts, [N, H]."""
    rows_NH: torch.Tensor = _Spread.apply(hidden_TH, order)
    return rows_NH


def collect(rows_NH: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """The sum of each token's rows, [T, H], in the order of the experts, in fp32 for lower precisions."""
    hidden_TH: torch.Tensor = _Collect.apply(rows_NH, order)
    return hidden_TH


def chosen(probs_TE: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """The gate weight of each row, [N]."""
    probs_N: torch.Tensor = _Chosen.apply(probs_TE, order)
    return probs_N


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, order: RowOrder) -> torch.Tensor:
        ctx.order = order
        return hidden_TH.index_select(0, order.token_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_by_token(grads[0], ctx.order), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: torch.Tensor, order: RowOrder) -> torch.Tensor:
        ctx.order = order
        return _sum_by_token(rows_NH, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].index_select(0, ctx.order.token_N), None


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs_TE: torch.Tensor, order: RowOrder) -> torch.Tensor:
        ctx.order = order
        return probs_TE.flatten().index_select(0, order.token_N * probs_TE.shape[1] + order.expert_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        map_ET = ctx.order.map_ET
        # Rows are the map's true places in its own order.
        grad_ET = torch.zeros_like(map_ET, dtype=grads[0].dtype).masked_scatter_(map_ET, grads[0])
        return grad_ET.T, None


def _sum_by_token(rows_NH: torch.Tensor, order: RowOrder) -> torch.Tensor:
    # On the CPU embedding_bag rounds ties of bf16 away from zero, where all else rounds them to even.
    rows = rows_NH.float() if rows_NH.device.type == "cpu" else rows_NH
    return F.embedding_bag(order.by_token_N, rows, order.starts_T, mode="sum").to(rows_NH.dtype)


class OrderedAlltoAll(MoEAlltoAllTokenDispatcher):
    """The alltoall dispatcher; with one expert rank rows lie by expert from the start and go straight to the experts.

    router: of the same layer, which knows whether there is padding.
    """

    router: PaddingAwareRouter

    @property
    def is_alone(self) -> bool:
        return bool(self.ep_size == self.tp_size == 1)

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        counts_E: torch.Tensor = routing_map.sum(0) if self.is_alone else super().preprocess(routing_map)
        return counts_E

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.hidden_shape, self.probs = hidden_states.shape, probs
        self.tokens_per_expert = self.preprocess(routing_map)
        if not self.is_alone:  # starts the copies of counts that the exchange waits for
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self.order = row_order(routing_map, _num_rows(self.router, routing_map))
        return spread(hidden_states.view(-1, self.hidden_shape[-1]), self.order), chosen(probs, self.order)

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.is_alone:
            found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = super().dispatch_postprocess(
                global_input_tokens, global_probs
            )
            return found
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows_NH: torch.Tensor = hidden_states if self.is_alone else super().combine_preprocess(hidden_states)
        return rows_NH

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        return collect(permutated_local_input_tokens, self.order).view(self.hidden_shape)


class OrderedAllGather(MoEAllGatherTokenDispatcher):
    """The allgather dispatcher: every rank has all tokens, and rows for its own experts."""

    router: PaddingAwareRouter
    routing_map: torch.Tensor

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        map_TE, self.local_probs = self.routing_map[:, mine], probs[:, mine]
        alone = self.ep_size == self.tp_size == 1
        self.order = row_order(map_TE, _num_rows(self.router, map_TE) if alone else int(map_TE.sum()))
        return spread(hidden_states, self.order), map_TE.sum(0), chosen(self.local_probs, self.order)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return collect(hidden_states, self.order)


def _num_rows(router: PaddingAwareRouter, map_TE: torch.Tensor) -> int:
    """How many choices the map of whole tokens holds; waits for the device only where padding made none."""
    return int(map_TE.sum()) if router.has_padding else len(map_TE) * router.topk


_ORDERED = {MoEAlltoAllTokenDispatcher: OrderedAlltoAll, MoEAllGatherTokenDispatcher: OrderedAllGather}


def use_ordered_dispatch(chunk: torch.nn.Module) -> None:
    """Makes every dispatcher of the model an ordered one: MoELayer names megatron-core's own in its code."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            dispatcher = module.token_dispatcher
            dispatcher.__class__ = _ORDERED[type(dispatcher)]
            dispatcher.router = module.router
