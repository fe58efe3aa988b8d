"""Routing Replay: packs run with the experts that another pass chose, weighed by the live router (SPEC section 6).

Strategy: for the length of one pass each router gets a RouterReplay of its own, taken out of megatron-core's global
list at once, so that nothing outlives the pass. Within a pack's scope it forces the pack's experts. Outside of scopes,
that is in the backward pass, it hands recomputation the same experts again, first pack first, which is the order in
which every pipeline schedule goes back.

Invariants: experts come in the order of their live scores, which is top-k's own, so that equal weights give equal
bits; gate weights and their gradient are those of the live router.

Shape letters: T tokens of a pack, C this context rank's part of them, L this pipeline stage's MoE layers, A all MoE
layers, K experts a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.errors import DataError
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import Groups
from gspo_moe.platform import prepare_megatron
from gspo_moe.routing.recorder import routers_of
from gspo_moe.routing.shards import local_routes
from gspo_moe.types import TrainingSample

prepare_megatron()

from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402

Scope = Callable[[int, torch.nn.Module, ContextSplit], contextlib.AbstractContextManager[None]]


class _PackReplay(RouterReplay):
    """Replays one layer's routes of the pack at hand."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        RouterReplay.global_router_replay_instances.remove(self)
        self._groups = groups
        self._pack_CK: torch.Tensor | None = None

    def enter(self, pack_CK: torch.Tensor) -> None:
        self._pack_CK = pack_CK
        self.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def leave(self, recomputes: bool) -> None:
        if recomputes:
            self.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        else:
            self.clear_router_replay_action()
            self.clear_indices()

    def get_replay_topk(self, scores: torch.Tensor, *arguments: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            assert self._pack_CK is not None
            experts = local_routes(self._pack_CK, len(scores), self._groups)
            order = scores.detach().gather(1, experts).argsort(dim=1, descending=True)
            self.set_target_indices(experts.gather(1, order))
        picked: tuple[torch.Tensor, torch.Tensor] = super().get_replay_topk(scores, *arguments, **more)
        return picked


@contextlib.contextmanager
def replay(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    routes: Sequence[torch.Tensor] | None,
    record: Scope,
    depth: int | None = None,
) -> Iterator[Scope]:
    """The scope under which one pass over packs replays `routes`; `record` opens within it. None replays nothing.

    chunks: this rank's parts of the model. routes: integers [T, L, K] a pack, of this stage's layers in their order,
    already checked. depth: replays only the model's first `depth` MoE layers.
    """
    if routes is None:
        yield record
        return
    routers = [router for router in routers_of(chunks) if depth is None or router.layer_number <= depth]
    layers = [_PackReplay(groups) for _ in routers]

    @contextlib.contextmanager
    def scope(index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        local_CLK = split.local(routes[index])
        assert len(local_CLK) == split.num_local, "routes of another pack"
        for number, layer in enumerate(layers):
            layer.enter(local_CLK[:, number])
        try:
            with record(index, chunk, split):
                yield
        finally:
            for router, layer in zip(routers, layers, strict=True):
                layer.leave(torch.is_grad_enabled() and router.config.recompute_granularity is not None)

    for router, layer in zip(routers, layers, strict=True):
        router.router_replay = layer
    try:
        yield scope
    finally:
        for router in routers:
            router.router_replay = None


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
