"""Predictive Routing Replay (arXiv 2606.00395): replayed routes that a linear map of a token's hidden state foretells.

Strategy: in the old policy's pass the experts are the top-k of softmax(p_old + h_old W^T) (eq. 4 to 6), and later
forwards replay them. What W adds to a router's logits is fitted to where these go: the loss of a layer is the mean of
KL(rho || rho_hat) over sampled tokens (eq. 8), rho the router of a training forward, a constant, and rho_hat what was
foretold. Its gradient by W is sum (rho_hat - rho) h_old^T, so that no graph is kept.

Invariants: with W = 0 routes are the router's own (but for ties that rounding makes where a router chooses by a softmax
over all experts in bf16). Gate weights are the live router's in either pass.

Shape letters: T tokens of a pack, P those that this rank routes with padding, L this pipeline stage's MoE layers, K
experts a token, E experts, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gspo_moe.parallel.context import ContextSplit
from gspo_moe.routing.recorder import Watching, route_dtype
from gspo_moe.routing.shards import StageLayers, gather_tokens, local_rows

# As `model.router.Observer`: the router, its logits and its choice, both [tokens, experts].
Observer = Callable[[Any, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Seen:
    """What one router met of a pack in the old policy's pass, in the rows that this rank routes."""

    hidden_PH: torch.Tensor
    logits_PE: torch.Tensor


@dataclass(frozen=True)
class Foretold:
    """Of one pack. routes_TLK: the experts, in the smallest integer type that holds an id. seen: by layer, or none."""

    routes_TLK: torch.Tensor
    seen: tuple[Seen, ...]


def foretold_logits(seen: Seen, weight_EH: torch.Tensor) -> torch.Tensor:
    """p_old + h_old W^T [P, E], float32 or what is wider."""
    return seen.logits_PE + seen.hidden_PH.float() @ weight_EH.T


@dataclass(frozen=True)
class Predictors:
    """This stage's routers in the order of their layers, W [E, H] (float32) of each, and which layers they are."""

    routers: Sequence[Any]
    weights: Sequence[torch.Tensor]
    layers: StageLayers

    @property
    def pairs(self) -> list[tuple[Any, torch.Tensor]]:
        return list(zip(self.routers, self.weights, strict=True))


class PredictedPass:
    """A pass over packs in which predictors say what experts tokens are to get.

    predictors: this stage's. record: listens in as well. forced: tokens run with those experts; else it is only kept
    which they would have got.
    """

    def __init__(self, predictors: Predictors, record: Watching | None, *, forced: bool) -> None:
        self._predictors = predictors
        self._layers = predictors.layers
        self._record = record
        self._forced = forced
        self._dtype = route_dtype(self._layers.architecture.num_experts)
        self._found: dict[int, dict[int, tuple[torch.Tensor, Seen | None]]] = {}
        self._splits: dict[int, ContextSplit] = {}

    @contextlib.contextmanager
    def scope(self, index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        """While open, packs are as in `RoutePass.scope`."""
        self._splits[index] = split
        found = self._found.setdefault(index, {})

        def keep(number: int, weight_EH: torch.Tensor) -> Observer:
            def observe(router: Any, logits_PE: torch.Tensor, picked_PE: torch.Tensor) -> None:
                seen, topk = Seen(router.hidden_PH, logits_PE), self._layers.architecture.num_experts_per_tok
                scores_PE = picked_PE.byte() if self._forced else foretold_logits(seen, weight_EH)
                # What a training forward meets is not held through its backward.
                kept = seen if self._forced else None
                found[number] = scores_PE.topk(topk, dim=1).indices.to(self._dtype), kept

            return observe

        with contextlib.ExitStack() as stack:
            for number, (router, weight_EH) in enumerate(self._predictors.pairs):
                stack.enter_context(_observed(router, keep(number, weight_EH)))
                if self._forced:
                    router.router_replay = _Foretelling(router, weight_EH)
                    stack.callback(setattr, router, "router_replay", None)
            if self._record is not None:
                stack.enter_context(self._record.scope(index, chunk, split))
            yield

    def foretold(self) -> list[Foretold]:
        """The packs by their index. Collective over tensor and context ranks."""
        return [self._of_pack(index) for index in sorted(self._found)]

    def _of_pack(self, index: int) -> Foretold:
        found, split = self._found[index], self._splits[index]
        layers = [found[number] for number in range(len(self._layers.indices))]
        routes_PLK = torch.stack([routes for routes, _ in layers], dim=1)
        whole_TLK = split.whole(gather_tokens(routes_PLK, self._layers.groups)[: split.num_local])
        return Foretold(whole_TLK, tuple(seen for _, seen in layers if seen is not None))


class _Foretelling:
    """Stands where a RouterReplay would: the top-k of what is foretold, in the order of the live scores."""

    def __init__(self, router: Any, weight_EH: torch.Tensor) -> None:
        self._router = router
        self._weight_EH = weight_EH

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = Seen(self._router.hidden_PH, self._router.logits_PE)
        foretold_PE = foretold_logits(seen, self._weight_EH)
        experts = choose(foretold_PE, topk, num_groups=num_groups, group_topk=group_topk)[1]
        experts = experts.gather(1, scores.gather(1, experts).argsort(dim=1, descending=True))
        return scores.gather(1, experts), experts


class Lesson:
    """What one mini-batch's training forwards teach the predictors.

    gradients: of the loss summed over tokens, by W, float32 [E, H] a layer. sums_L3: float64, of each layer KL(rho ||
    rho_hat) and KL(rho || rho_old) (nats) summed over tokens, and tokens. Both of this rank's rows.
    """

    def __init__(
        self,
        predictors: Predictors,
        record: Watching | None,
        packs: Sequence[tuple[Foretold, torch.Tensor]],
    ) -> None:
        """record: listens in as well. packs: with each one's tokens that count, bool [T]."""
        self._predictors = predictors
        self._record = record
        self._packs = packs
        weights = predictors.weights
        self.gradients = [torch.zeros_like(weight) for weight in weights]
        self.sums_L3 = torch.zeros(len(weights), 3, dtype=torch.float64, device=weights[0].device)

    @contextlib.contextmanager
    def scope(self, index: int, chunk: torch.nn.Module, split: ContextSplit) -> Iterator[None]:
        """While open, packs are as in `RoutePass.scope`."""
        foretold, mask_T = self._packs[index]
        mask_C1 = split.local(mask_T)[:, None]

        def learn(number: int, weight_EH: torch.Tensor) -> Observer:
            def observe(router: Any, logits_PE: torch.Tensor, picked_PE: torch.Tensor) -> None:
                mask_P1 = local_rows(mask_C1, len(logits_PE), self._predictors.layers.groups)
                seen = foretold.seen[number]
                gradient_EH, sums_3 = lesson_of(seen, weight_EH, logits_PE, mask_P1)
                self.gradients[number] += gradient_EH
                self.sums_L3[number] += sums_3

            return observe

        with contextlib.ExitStack() as stack:
            for number, (router, weight_EH) in enumerate(self._predictors.pairs):
                stack.enter_context(_observed(router, learn(number, weight_EH)))
            if self._record is not None:
                stack.enter_context(self._record.scope(index, chunk, split))
            yield


def lesson_of(
    seen: Seen, weight_EH: torch.Tensor, logits_PE: torch.Tensor, mask_P1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's gradient [E, H] and sums [3] of the rows in the mask, as `Lesson` adds them up.

    logits_PE: the router's, in the training forward.
    """
    assert len(seen.logits_PE) == len(logits_PE), "padded otherwise than in the old policy's pass"
    now_PE, old_PE, foretold_PE = (
        logits.float().log_softmax(dim=1) for logits in (logits_PE, seen.logits_PE, foretold_logits(seen, weight_EH))
    )
    rho_PE = now_PE.exp() * mask_P1
    error_PE = foretold_PE.exp() * mask_P1 - rho_PE
    each = (rho_PE * (now_PE - foretold_PE), rho_PE * (now_PE - old_PE), mask_P1)
    return error_PE.T @ seen.hidden_PH.float(), torch.stack([part.double().sum() for part in each])


@contextlib.contextmanager
def _observed(router: Any, observe: Observer) -> Iterator[None]:
    router.observers += (observe,)
    try:
        yield
    finally:
        router.observers = tuple(each for each in router.observers if each is not observe)
