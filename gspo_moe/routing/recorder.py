"""Keeps which experts the router picked, layer by layer, while packs run through the model.

Strategy: a forward hook on each router reads its routing map, only inside a `scope`. Recomputation runs the same
routers again during the backward pass, outside any scope, and so is never recorded twice.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, A all MoE layers, K experts a token,
E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from gspo_moe.config.architecture import Architecture
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import Groups
from gspo_moe.routing.load import expert_load
from gspo_moe.routing.volatility import overlap_TL


def route_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds every expert id."""
    return torch.uint8 if num_experts <= 256 else torch.int16


class RouteRecorder:
    """Records the routes of every router in `chunks`, this rank's parts of one model; `close` takes the hooks off."""

    def __init__(self, chunks: Sequence[torch.nn.Module], architecture: Architecture, groups: Groups) -> None:
        self._groups = groups
        self._num_layers = architecture.num_hidden_layers
        self._topk = architecture.num_experts_per_tok
        self._num_experts = architecture.num_experts
        self._dtype = route_dtype(architecture.num_experts)
        self._current: dict[int, torch.Tensor] | None = None
        self._packs: dict[int, dict[int, torch.Tensor]] = {}
        routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
        self.layers = tuple(router.layer_number - 1 for router in routers)
        self._hooks = [router.register_forward_hook(self._keep) for router in routers]

    def _keep(self, router: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._current is None:
            return
        routing_map = output[1]
        picked = routing_map.int().topk(self._topk, dim=1).indices
        self._current[router.layer_number - 1] = picked.to(self._dtype)

    @contextlib.contextmanager
    def scope(self, index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        """While open, routes belong to pack `index`, of which this rank has the tokens of `split`, then padding."""
        found: dict[int, torch.Tensor] = {}
        self._current = found
        try:
            yield
        finally:
            self._current = None
        pack = self._packs.setdefault(index, {})
        for layer, routes in found.items():
            pack[layer] = split.whole(self._gather_tokens(routes)[: split.num_local])

    def _gather_tokens(self, routes: torch.Tensor) -> torch.Tensor:
        # Under sequence parallelism each tensor rank routes its own stretch of the pack.
        if not self._groups.layout.sequence_parallel:
            return routes
        parts = [torch.empty_like(routes) for _ in range(self._groups.tensor.size())]
        dist.all_gather(parts, routes.contiguous(), group=self._groups.tensor)
        return torch.cat(parts)

    def take(self) -> list[torch.Tensor]:
        """The recorded packs' routes [T, L, K] in the order of `layers`, by pack index; forgets them."""
        packs = [torch.stack([self._packs[i][layer] for layer in self.layers], dim=1) for i in sorted(self._packs)]
        self._packs = {}
        return packs

    def overlap(self, old_TLK: torch.Tensor, new_TLK: torch.Tensor) -> torch.Tensor:
        """Shared experts [T, A] of two recordings of this stage, put together over the pipeline's stages."""
        local_TL = overlap_TL(old_TLK, new_TLK)
        overlap_TA = local_TL.new_zeros((local_TL.shape[0], self._num_layers), dtype=torch.int32)
        overlap_TA[:, list(self.layers)] = local_TL.to(torch.int32)
        if self._groups.pipeline.size() > 1:
            dist.all_reduce(overlap_TA, group=self._groups.pipeline)
        return overlap_TA

    def load(self, packs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens of these recordings [T, L, K] that each expert got, int64 [A, E], put together over the stages."""
        load_AE = packs[0].new_zeros((self._num_layers, self._num_experts), dtype=torch.int64)
        for routes_TLK in packs:
            load_AE[list(self.layers)] += expert_load(routes_TLK, self._num_experts)
        if self._groups.pipeline.size() > 1:
            dist.all_reduce(load_AE, group=self._groups.pipeline)
        return load_AE

    def gather_layers(self, routes_TLK: torch.Tensor) -> torch.Tensor:
        """Routes [T, A, K] of all layers, put together over the pipeline's stages."""
        shape = (routes_TLK.shape[0], self._num_layers, self._topk)
        routes_TAK = routes_TLK.new_zeros(shape, dtype=torch.int32)
        routes_TAK[:, list(self.layers)] = routes_TLK.to(torch.int32)
        if self._groups.pipeline.size() > 1:
            dist.all_reduce(routes_TAK, group=self._groups.pipeline)
        return routes_TAK.to(self._dtype)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
