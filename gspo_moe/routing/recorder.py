"""Keeps which experts the router picked, layer by layer, while packs run through the model.

Strategy: every router calls its observers with its choice; the recorder listens only inside a `scope`. Recomputation
runs the same routers again during the backward pass, outside any scope, and so is never recorded twice.
Under replay a router is told its experts; recorded is then what it would have picked itself.

Shape letters: T tokens of a pack, C this context rank's part of them, P those that it routes with padding, L this
pipeline stage's MoE layers, A all MoE layers, K experts a token, E experts, N sequences of a pack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.router import TopKRouter

from gspo_moe.config.architecture import Architecture
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import Groups
from gspo_moe.routing.load import expert_load
from gspo_moe.routing.shards import gather_tokens, local_routes, spread_layers
from gspo_moe.routing.volatility import PairSums, log_shift_TL, overlap_TL, set_change_NL
from gspo_moe.types import Microbatch


def route_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds every expert id."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def routers_of(chunks: Sequence[torch.nn.Module]) -> list[TopKRouter]:
    """This rank's routers in the order of their layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


@dataclass(frozen=True)
class Recording:
    """One pack's routes in this pipeline stage's layers.

    routes_TLK: the router's choice, in the smallest integer type that holds an expert id.
    margin_TL: float32, p_(K) - p_(K+1) of the softmax over all experts; None without scores or with a reference.
    log_probs_TLK: float32, that softmax's log-probs (nats) of the experts in routes_TLK, or of those of the reference
        routes that it was recorded against; None without scores.
    """

    routes_TLK: torch.Tensor
    margin_TL: torch.Tensor | None = None
    log_probs_TLK: torch.Tensor | None = None


class RouteRecorder:
    """Records the routes of every router in `chunks`, this rank's parts of one model; `close` stops listening.

    scores: also keeps margins and log-probs of the router.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], architecture: Architecture, groups: Groups, scores: bool = False
    ) -> None:
        self._groups = groups
        self._architecture = architecture
        self._dtype = route_dtype(architecture.num_experts)
        self._scores = scores
        self._routers = routers_of(chunks)
        self.layers = tuple(router.layer_number - 1 for router in self._routers)
        self._reference: Sequence[torch.Tensor] | None = None
        self._pack: int | None = None
        # By pack and layer, for the tokens [P] that this rank routes: routes [P, K], and margin (without a reference)
        # beside log-probs [P, 1 + K].
        self._found: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._splits: dict[int, ContextSplit] = {}
        for router in self._routers:
            router.observers += (self._observe,)

    def _observe(self, router: TopKRouter, logits_PE: torch.Tensor, routing_map_PE: torch.Tensor) -> None:
        if self._pack is None:
            return
        topk, layer = self._architecture.num_experts_per_tok, router.layer_number - 1
        if router.router_replay is None:
            picked_PE, routes_PK = routing_map_PE, routing_map_PE.byte().topk(topk, dim=1).indices
        else:
            routes_PK = logits_PE.topk(topk, dim=1).indices
            picked_PE = torch.zeros_like(routing_map_PE).scatter(1, routes_PK, True)
        scores = None
        if self._scores:
            log_probs_PE = logits_PE.float().log_softmax(dim=1)
            if self._reference is None:
                own_PK = log_probs_PE.gather(1, routes_PK)
                scores = torch.cat([_margin(log_probs_PE, own_PK, picked_PE), own_PK], dim=1)
            else:
                reference_CK = self._splits[self._pack].local(self._reference[self._pack])[:, self.layers.index(layer)]
                scores = log_probs_PE.gather(1, local_routes(reference_CK, len(routes_PK), self._groups))
        self._found.setdefault(self._pack, {})[layer] = (routes_PK.to(self._dtype), scores)

    @contextlib.contextmanager
    def scope(self, index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        """While open, routes belong to pack `index`, of which this rank has the tokens of `split`, then padding."""
        self._splits[index] = split
        self._pack = index
        try:
            yield
        finally:
            self._pack = None

    def against(self, reference: Sequence[torch.Tensor]) -> None:
        """Until the next `take`, keeps the log-probs of these routes [T, L, K] a pack, not of the router's own."""
        self._reference = reference

    def take(self) -> list[Recording]:
        """The recorded packs by their index; forgets them. Collective over tensor and context ranks."""
        found, self._found, self._reference = self._found, {}, None
        return [self._recording(found[index], self._splits[index]) for index in sorted(found)]

    def recorded(self, index: int) -> Recording:
        """What this pass has kept of pack `index`, whose forward is done. Collective over tensor and context ranks."""
        return self._recording(self._found[index], self._splits[index])

    def _recording(self, found: dict[int, tuple[torch.Tensor, torch.Tensor | None]], split: ContextSplit) -> Recording:
        layers = [found[layer] for layer in self.layers]
        routes_TLK = self._whole(torch.stack([routes for routes, _ in layers], dim=1), split)
        if not self._scores:
            return Recording(routes_TLK)
        local = torch.stack([scores for _, scores in layers if scores is not None], dim=1)
        scores = self._whole(local, split)
        if scores.shape[-1] == routes_TLK.shape[-1]:
            return Recording(routes_TLK, None, scores)
        return Recording(routes_TLK, scores[..., 0], scores[..., 1:])

    def _whole(self, values_PL: torch.Tensor, split: ContextSplit) -> torch.Tensor:
        return split.whole(gather_tokens(values_PL, self._groups)[: split.num_local])

    def compare(self, pack: Microbatch, old: Recording, new: Recording) -> PairSums:
        """The figures of SPEC section 4 for one pack's response tokens. Collective over the pipeline.

        Those that need scores are left out where one has none; with scores `new` was recorded `against` old's routes.
        """
        mask_T, topk = pack.route_mask_T, self._architecture.num_experts_per_tok
        sequence_T = pack.sequence_T[mask_T]
        old_TLK, new_TLK = old.routes_TLK[mask_T], new.routes_TLK[mask_T]
        tokens_TL = [overlap_TL(old_TLK, new_TLK).double()]
        if old.margin_TL is not None and old.log_probs_TLK is not None and new.log_probs_TLK is not None:
            tokens_TL += [log_shift_TL(old.log_probs_TLK[mask_T], new.log_probs_TLK[mask_T])]
            tokens_TL += [old.margin_TL[mask_T].double()]
        set_change = set_change_NL(old_TLK, new_TLK, sequence_T, pack.num_sequences, self._architecture.num_experts)
        overlap, *scores = self._spread(torch.stack(tokens_TL, dim=-1)).unbind(dim=-1)
        return PairSums.of_pack(overlap, self._spread(set_change), sequence_T, topk, *scores)

    def router_shift(self, old: Recording, new: Recording) -> torch.Tensor:
        """gamma of SPEC section 4 of each token over all MoE layers, float64 [T]. Collective over the pipeline.

        Both with scores; `new` was recorded `against` old's routes. Exactly 1 where no score moved.
        """
        assert old.log_probs_TLK is not None
        assert new.log_probs_TLK is not None
        return self._spread(log_shift_TL(old.log_probs_TLK, new.log_probs_TLK)).mean(dim=1).exp()

    def load(self, recordings: Sequence[Recording]) -> torch.Tensor:
        """Tokens of these recordings that each expert got, int64 [A, E], put together over the stages."""
        experts = self._architecture.num_experts
        load_LE = sum(expert_load(recording.routes_TLK, experts) for recording in recordings)
        assert isinstance(load_LE, torch.Tensor), "nothing was recorded"
        return self._spread(load_LE[None])[0]

    def gather_layers(self, recording: Recording) -> torch.Tensor:
        """Routes [T, A, K] of all layers, put together over the pipeline's stages."""
        return self._spread(recording.routes_TLK.int()).to(self._dtype)

    def _spread(self, values_XL: torch.Tensor) -> torch.Tensor:
        return spread_layers(values_XL, self.layers, self._architecture.num_hidden_layers, self._groups)

    def close(self) -> None:
        for router in self._routers:
            router.observers = tuple(each for each in router.observers if each != self._observe)


def _margin(log_probs_PE: torch.Tensor, own_PK: torch.Tensor, picked_PE: torch.Tensor) -> torch.Tensor:
    """p of the last expert picked less p of the first one not picked (0 where all are), float32 [P, 1]."""
    best_other_P1 = log_probs_PE.masked_fill(picked_PE, -torch.inf).amax(dim=1, keepdim=True)
    return own_PK.amin(dim=1, keepdim=True).exp() - best_other_P1.exp()
