"""Routing Replay: packs run with the experts that another pass chose, weighed by the live router (SPEC section 6).

Strategy: for the length of one pass each router gets a RouterReplay of its own, taken out of megatron-core's global
list at once, so that nothing outlives the pass. Within a pack's scope it forces the pack's experts. Outside of scopes,
that is in the backward pass, it hands recomputation the same experts again, first pack first, which is the order in
which every pipeline schedule goes back.

Invariants: experts come in the order of their live scores, which is top-k's own, so that equal weights give equal
bits; gate weights and their gradient are those of the live router, unless they are replayed too. Each layer of this
stage takes each pack's routes once in the forward pass, has them in effect, and, where it recomputes, takes them once
more: else the pass fails, with the layer and pack by name.

Shape letters: T tokens of a pack, C this context rank's part of them, L this pipeline stage's MoE layers, A all MoE
layers, K experts a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.errors import DataError, TrainingError
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import Groups
from gspo_moe.platform import prepare_megatron
from gspo_moe.routing.recorder import routers_of
from gspo_moe.routing.shards import local_routes, local_rows
from gspo_moe.types import TrainingSample

prepare_megatron()

from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402

Scope = Callable[[int, torch.nn.Module, ContextSplit], contextlib.AbstractContextManager[None]]


@dataclass
class Ledger:
    """rows: of this context rank's tokens, by layer from 0, how many a router took its routes for."""

    rows: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """What one pack replays.

    routes_TLK: integers. gates_TLK: floats, the gate weights of those experts, constants; None for the live router's.
    held_TL: bool, where that holds; elsewhere the live router routes. None for everywhere.
    """

    routes_TLK: torch.Tensor
    gates_TLK: torch.Tensor | None = None
    held_TL: torch.Tensor | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Replayed:
        gates, held = (None if part is None else change(part) for part in (self.gates_TLK, self.held_TL))
        return Replayed(change(self.routes_TLK), gates, held)

    def layer(self, number: int) -> Replayed:
        """The same of one layer: [T, K] and [T]."""
        return self.each(lambda part_TL: part_TL[:, number])


class _PackReplay(RouterReplay):
    """Replays one layer's routes of the pack at hand.

    times: how often it took them. in_effect: bool [], on the device, whether the router has picked them ever since.
    """

    def __init__(self, groups: Groups, layer: int) -> None:
        super().__init__()
        RouterReplay.global_router_replay_instances.remove(self)
        self._groups = groups
        self._pack: Replayed | None = None
        self._gates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.layer = layer
        self.times = 0
        self.in_effect: torch.Tensor | None = None

    def enter(self, pack: Replayed) -> None:
        self._pack, self.times = pack, 0
        self.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def leave(self, recomputes: bool) -> None:
        if recomputes:
            self.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        else:
            self.clear_router_replay_action()
            self.clear_indices()
            self._gates = []

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        choose: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            assert self._pack is not None
            experts = local_routes(self._pack.routes_TLK, len(scores), self._groups)
            held = None
            if self._pack.held_TL is not None:
                held = local_rows(self._pack.held_TL[:, None], len(scores), self._groups)
                experts = torch.where(held, experts, choose(scores, topk, num_groups, group_topk)[1])
            if self._pack.gates_TLK is not None:
                self._gates.append((experts, local_rows(self._pack.gates_TLK, len(scores), self._groups), held))
            order = scores.detach().gather(1, experts).argsort(dim=1, descending=True)
            self.set_target_indices(experts.gather(1, order))
            self.times += 1
        picked: tuple[torch.Tensor, torch.Tensor] = super().get_replay_topk(
            scores, topk, num_groups, group_topk, choose
        )
        return picked

    def gates(self, weights_PE: torch.Tensor) -> torch.Tensor:
        """The weights of the choice just made: the live router's [P, E], or what is replayed in their place."""
        if not self._gates:
            return weights_PE
        # The forward leaves its own for recomputation, first pack first, as megatron-core does with experts.
        recomputes = self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD
        experts, gates, held = self._gates.pop(0) if recomputes else self._gates[-1]
        found_PE = torch.zeros_like(weights_PE).scatter(1, experts, gates.to(weights_PE.dtype))
        return found_PE if held is None else torch.where(held, found_PE, weights_PE)

    def observe(self, router: torch.nn.Module, logits_PE: torch.Tensor, routing_map_PE: torch.Tensor) -> None:
        """Sees what the router picked in the end."""
        if self.times:
            assert self.target_topk_idx is not None
            picked = routing_map_PE.gather(1, self.target_topk_idx).all()
            self.in_effect = picked if self.in_effect is None else self.in_effect & picked


@contextlib.contextmanager
def replay(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    routes: Sequence[torch.Tensor | Replayed] | None,
    record: Scope,
    depth: int | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Scope]:
    """The scope under which one pass over packs replays `routes`; `record` opens within it. None replays nothing.

    chunks: this rank's parts of the model. routes: integers [T, L, K] a pack, of this stage's layers in their order,
    already checked, or more than those. depth: replays only the model's first `depth` MoE layers. ledger: is told what
    was taken.
    Raises TrainingError where the routes are of other layers than the stage's, and for a layer that did not take a
    pack's routes once, or picked other experts.
    """
    if routes is None:
        yield record
        return
    everywhere = routers_of(chunks)
    packs = [one if isinstance(one, Replayed) else Replayed(one) for one in routes]
    for number, one in enumerate(packs):
        if one.routes_TLK.shape[1] != len(everywhere):
            raise TrainingError(
                f"routes to replay of pack {number} are of {one.routes_TLK.shape[1]} MoE layers, and this pipeline "
                f"stage has {len(everywhere)} ({', '.join(str(router.layer_number - 1) for router in everywhere)}); "
                "let each layer report its routes"
            )
    routers = [router for router in everywhere if depth is None or router.layer_number <= depth]
    layers = [_PackReplay(groups, router.layer_number - 1) for router in routers]
    of_chunk = {id(chunk): {router.layer_number - 1 for router in routers_of([chunk])} for chunk in chunks}

    @contextlib.contextmanager
    def scope(index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        local = packs[index].each(split.local)
        assert len(local.routes_TLK) == split.num_local, "routes of another pack"
        for number, layer in enumerate(layers):
            layer.enter(local.layer(number))
        try:
            with _watched(routers, layers), record(index, chunk, split):
                yield
            for layer in layers:
                _check_taken(layer, index, expected=int(layer.layer in of_chunk[id(chunk)]))
                if ledger is not None and layer.times:
                    ledger.rows[layer.layer] = ledger.rows.get(layer.layer, 0) + split.num_local
        finally:
            for router, layer in zip(routers, layers, strict=True):
                layer.leave(torch.is_grad_enabled() and router.config.recompute_granularity is not None)

    for router, layer in zip(routers, layers, strict=True):
        router.router_replay = layer
    try:
        yield scope
        _check_done(layers)
    finally:
        for router in routers:
            router.router_replay = None


@contextlib.contextmanager
def _watched(routers: Sequence[Any], layers: Sequence[_PackReplay]) -> Iterator[None]:
    before = [router.observers for router in routers]
    for router, layer in zip(routers, layers, strict=True):
        router.observers += (layer.observe,)
    try:
        yield
    finally:
        for router, observers in zip(routers, before, strict=True):
            router.observers = observers


def _check_taken(layer: _PackReplay, index: int, expected: int) -> None:
    if layer.times != expected:
        raise TrainingError(
            f"Routing Replay: MoE layer {layer.layer} took the routes of pack {index} {layer.times} times in one "
            f"forward pass, not {'once' if expected else 'in the chunk that has it'}, so that what ran is not what was "
            "to be replayed; does a wrapper of the router, a fused kernel or a captured graph leave its top-k out?"
        )


def _check_done(layers: Sequence[_PackReplay]) -> None:
    """Behind a whole pass, its backward included; waits for the device once."""
    left = {layer.layer: len(layer.replay_backward_list) for layer in layers if layer.replay_backward_list}
    if left:
        raise TrainingError(
            f"Routing Replay: routes that recomputation was to take were left over ({_listed(left)}; packs by MoE "
            "layer), so that gradients are of other routes than the forward pass; does it recompute other layers?"
        )
    seen = [layer for layer in layers if layer.in_effect is not None]
    effects = torch.stack([layer.in_effect for layer in seen if layer.in_effect is not None]).tolist() if seen else []
    without = [str(layer.layer) for layer, in_effect in zip(seen, effects, strict=True) if not in_effect]
    if without:
        raise TrainingError(
            f"Routing Replay: MoE layers {', '.join(without)} picked other experts than those replayed, so that it did "
            "nothing there; does something choose experts behind the router's top-k?"
        )


def _listed(counts: dict[int, int]) -> str:
    return ", ".join(f"{layer}: {count}" for layer, count in counts.items())


def check_routes(samples: Iterable[tuple[int, TrainingSample]], architecture: Architecture) -> None:
    """Raises DataError, naming the sample by its number and the layer, for routes that cannot be its tokens'."""
    layers, topk, experts = (
        architecture.num_hidden_layers,
        architecture.num_experts_per_tok,
        architecture.num_experts,
    )
    for index, sample in samples:
        routes, tokens = sample.routes, len(sample.token_ids)
        if routes is None:
            raise DataError(f"sample {index} has no routes; let the rollout engine report them, or turn replay off")
        if routes.is_floating_point() or routes.ndim != 3 or tuple(routes.shape) != (tokens - 1, layers, topk):
            raise DataError(
                f"sample {index}: routes {list(routes.shape)} of {routes.dtype} do not fit its {tokens} tokens; they "
                f"must be integers [{tokens - 1} (every token but the last), layers 0 to {layers - 1}, top-{topk}]"
            )
        ids = routes.long().sort(dim=-1).values
        wrong = (ids < 0) | (ids >= experts)
        wrong[..., 1:] |= ids[..., 1:] == ids[..., :-1]
        if wrong.any():
            token, layer, _ = wrong.nonzero()[0].tolist()
            raise DataError(
                f"sample {index}, layer {layer}, token {token}: routes {routes[token, layer].tolist()} are not {topk} "
                f"different experts of 0 to {experts - 1}; does the engine serve this model?"
            )
