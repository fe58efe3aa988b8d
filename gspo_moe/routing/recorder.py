"""Keeps which experts the router picked, layer by layer, while packs run through the model.

Strategy: every router calls its observers with its choice; a pass observes only inside its `scope`, and all that is
found belongs to it. Recomputation runs the same routers again during the backward pass, outside any scope, and so is
never recorded twice. Under replay a router is told its experts; recorded is then what it would have picked itself.

Shape letters: T tokens of a pack, C this context rank's part of them, P those that it routes with padding, L this
pipeline stage's MoE layers, K experts a token, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import Groups
from gspo_moe.platform import prepare_megatron
from gspo_moe.routing.shards import StageLayers, gather_tokens, local_routes

prepare_megatron()

from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402


def route_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds every expert id."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def routers_of(chunks: Sequence[torch.nn.Module]) -> list[TopKRouter]:
    """This rank's routers in the order of their layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


class Watching(Protocol):
    """What listens in on a pass over packs."""

    def scope(
        self, index: int, chunk: torch.nn.Module, split: ContextSplit
    ) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True)
class OwnScores:
    """The softmax over all experts at the router's own choice, float32.

    margin_TL: p_(K) - p_(K+1). log_probs_TLK: of the experts in `Recording.routes_TLK` (nats). gates_TLK: the weights
    that those experts' outputs were added with; None unless asked for.
    """

    margin_TL: torch.Tensor
    log_probs_TLK: torch.Tensor
    gates_TLK: torch.Tensor | None = None


@dataclass(frozen=True)
class Recording:
    """One pack's routes in this pipeline stage's layers.

    routes_TLK: the router's choice, in the smallest integer type that holds an expert id.
    own: that choice's scores; None without scores and in a pass with a reference.
    reference_log_probs_TLK: float32, the router's log-probs (nats) of the reference's experts, in its order; None
        without scores and without a reference.
    """

    routes_TLK: torch.Tensor
    own: OwnScores | None = None
    reference_log_probs_TLK: torch.Tensor | None = None


class RouteRecorder:
    """Starts passes that record every router in `chunks`, this rank's parts of one model; keeps nothing of them.

    scores: also records the router's scores. gates: and the gate weights with them.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        architecture: Architecture,
        groups: Groups,
        scores: bool = False,
        gates: bool = False,
    ) -> None:
        self._routers = routers_of(chunks)
        self._scores = scores
        self._gates = gates
        self.layers = StageLayers(tuple(router.layer_number - 1 for router in self._routers), architecture, groups)

    def start(self, reference: Sequence[torch.Tensor] | None = None) -> RoutePass:
        """A pass over packs. reference: routes [T, L, K] a pack, whose scores it keeps and not its own choice's."""
        return RoutePass(self._routers, self.layers, self._scores, self._gates, reference)


class RoutePass:
    """What the routers pick in one pass over packs, arguments as in `RouteRecorder`. It lives as long as it is held."""

    def __init__(
        self,
        routers: Sequence[TopKRouter],
        layers: StageLayers,
        scores: bool,
        gates: bool,
        reference: Sequence[torch.Tensor] | None,
    ) -> None:
        self._routers = routers
        self._layers = layers
        self._scores = scores
        self._gates = gates
        self._reference = reference
        self._dtype = route_dtype(layers.architecture.num_experts)
        # By pack and layer, for the tokens [P] that this rank routes: routes [P, K], and margin (without a reference)
        # beside log-probs [P, 1 + K], behind them gates where they are asked for.
        self._found: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._splits: dict[int, ContextSplit] = {}

    @contextlib.contextmanager
    def scope(self, index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        """While open, routes belong to pack `index`, of which this rank has the tokens of `split`, then padding."""
        self._splits[index] = split

        def observe(router: TopKRouter, logits_PE: torch.Tensor, routing_map_PE: torch.Tensor) -> None:
            found = self._choice(router, logits_PE, routing_map_PE, index)
            self._found.setdefault(index, {})[router.layer_number - 1] = found

        for router in self._routers:
            router.observers += (observe,)
        try:
            yield
        finally:
            for router in self._routers:
                router.observers = tuple(each for each in router.observers if each is not observe)

    def recordings(self) -> list[Recording]:
        """The recorded packs by their index. Collective over tensor and context ranks."""
        return [self.recorded(index) for index in sorted(self._found)]

    def recorded(self, index: int) -> Recording:
        """What was found of pack `index`, whose forward is done. Collective over tensor and context ranks."""
        layers = [self._found[index][layer] for layer in self._layers.indices]
        routes_TLK = self._whole([routes for routes, _ in layers], index)
        if not self._scores:
            return Recording(routes_TLK)
        scores = self._whole([scores for _, scores in layers if scores is not None], index)
        if self._reference is None:
            topk = routes_TLK.shape[-1]
            gates_TLK = scores[..., 1 + topk :] if self._gates else None
            return Recording(routes_TLK, OwnScores(scores[..., 0], scores[..., 1 : 1 + topk], gates_TLK))
        return Recording(routes_TLK, reference_log_probs_TLK=scores)

    def _choice(
        self, router: TopKRouter, logits_PE: torch.Tensor, routing_map_PE: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        topk = self._layers.architecture.num_experts_per_tok
        if router.router_replay is None:
            picked_PE, routes_PK = routing_map_PE, routing_map_PE.byte().topk(topk, dim=1).indices
        else:
            routes_PK = logits_PE.topk(topk, dim=1).indices
            picked_PE = torch.zeros_like(routing_map_PE).scatter(1, routes_PK, True)
        kept_PK = routes_PK.to(self._dtype)
        if not self._scores:
            return kept_PK, None
        log_probs_PE = logits_PE.float().log_softmax(dim=1)
        if self._reference is None:
            own_PK = log_probs_PE.gather(1, routes_PK)
            found = [_margin(log_probs_PE, own_PK, picked_PE), own_PK]
            if self._gates:
                assert router.weights_PE is not None
                found.append(router.weights_PE.float().gather(1, routes_PK))
            return kept_PK, torch.cat(found, dim=1)
        layer = self._layers.indices.index(router.layer_number - 1)
        reference_CK = self._splits[index].local(self._reference[index])[:, layer]
        reference_PK = local_routes(reference_CK, len(routes_PK), self._layers.groups)
        return kept_PK, log_probs_PE.gather(1, reference_PK)

    def _whole(self, layers: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        """The whole pack's [T, L, ...] of each layer's [P, ...]."""
        split = self._splits[index]
        return split.whole(gather_tokens(torch.stack(list(layers), dim=1), self._layers.groups)[: split.num_local])


def _margin(log_probs_PE: torch.Tensor, own_PK: torch.Tensor, picked_PE: torch.Tensor) -> torch.Tensor:
    """p of the last expert picked less p of the first one not picked (0 where all are), float32 [P, 1]."""
    best_other_P1 = log_probs_PE.masked_fill(picked_PE, -torch.inf).amax(dim=1, keepdim=True)
    return own_PK.amin(dim=1, keepdim=True).exp() - best_other_P1.exp()
