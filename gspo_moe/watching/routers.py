"""The routers of a model that nobody here wrote, known by their form; and what each says of a forward.

Shape letters: T tokens of a forward in the router's order, E experts, K experts a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gspo_moe.errors import ConfigError, DataError

NAMES = re.compile(r"(Router|Gate|Gating)$")
BIASES = ("moe_statics", "expert_bias", "e_score_correction_bias")  # what a layer adds to its gate's scores


@dataclass(frozen=True)
class Choice:
    """One router's forward. weights_TK: None where the router leaves them to the layer around it.

    bias_E: added to the scores for the choice alone. groups: see `gates.margin`.
    """

    logits_TE: torch.Tensor
    routes_TK: torch.Tensor
    weights_TK: torch.Tensor | None
    bias_E: torch.Tensor | None
    groups: int


class Router(Protocol):
    """A router by its form. sequence_first: whether its tokens come as [sequence, batch]."""

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def sequence_first(self) -> bool: ...

    def choice(self, arguments: tuple[Any, ...], output: Any) -> Choice:
        """What it picked, of a forward hook's arguments. Raises DataError for an output of another form."""
        ...

    def forced(self, output: Any, routes_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        """Its output as if it had picked these experts. Raises ConfigError where its form has no place for them."""
        ...


@dataclass(frozen=True)
class TopKRouter:
    """transformers 5's: gives logits [T, E], or in earlier ones their softmax, weights [T, K] and experts [T, K]."""

    module: torch.nn.Module
    sequence_first = False

    def choice(self, arguments: tuple[Any, ...], output: Any) -> Choice:
        if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(x, torch.Tensor) for x in output)):
            raise DataError(
                f"{type(self.module).__name__} gave {_form(output)} where transformers 5's routers give logits, "
                "weights and experts; use transformers >= 5"
            )
        logits, weights, routes = (one.detach().flatten(0, -2) for one in output)
        if logits.shape[1] < routes.shape[1] or weights.shape != routes.shape or routes.is_floating_point():
            raise DataError(
                f"{type(self.module).__name__} gave {_form(output)}: not logits [tokens, experts], weights and experts "
                "[tokens, topk]; this model cannot be watched"
            )
        bias = getattr(getattr(self.module, "moe_statics", self.module), "e_score_correction_bias", None)
        if bias is None and len(arguments) > 1:  # where the layer around it holds the bias
            bias = arguments[1]
        return Choice(_as_logits(logits), routes.long(), weights, _bias(bias), _count(self.module, "num_group"))

    def forced(self, output: Any, routes_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        logits, weights, routes = output
        return logits, weights_TK.to(weights.dtype).view_as(weights), routes_TK.to(routes.dtype).view_as(routes)


@dataclass(frozen=True)
class LinearGate:
    """transformers 4's: a linear layer, of whose softmax the layer around it takes the top k."""

    module: torch.nn.Module
    topk: int
    sequence_first = False

    def choice(self, arguments: tuple[Any, ...], output: Any) -> Choice:
        logits_TE = output.detach().flatten(0, -2)
        return Choice(logits_TE, logits_TE.float().softmax(dim=-1).topk(self.topk, dim=-1).indices, None, None, 1)

    def forced(self, output: Any, routes_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        raise ConfigError("routes can be held only where the router itself weighs them; use transformers >= 5")


@dataclass(frozen=True)
class MegatronRouter:
    """megatron-core's: gives weights and choice, both [T, E]; its logits are taken once more, by its own `gating`."""

    module: Any
    sequence_first = True

    def choice(self, arguments: tuple[Any, ...], output: Any) -> Choice:
        probs_TE, map_TE = (one.detach() for one in output)
        topk = self.module.topk
        if not (map_TE.sum(dim=1) == topk).all():
            raise DataError(
                f"a token went to other than {topk} experts: padding, or moe_expert_capacity_factor, dropped it; watch "
                "a forward without either"
            )
        with torch.no_grad():
            logits_TE = self.module.gating(arguments[0]).detach().view(map_TE.shape)
        routes_TK = map_TE.byte().topk(topk, dim=1).indices
        groups = _count(self.module.config, "moe_router_num_groups")
        bias_E = _bias(getattr(self.module, "expert_bias", None))
        return Choice(logits_TE, routes_TK, probs_TE.gather(1, routes_TK), bias_E, groups)

    def forced(self, output: Any, routes_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        probs_TE, map_TE = output
        probs_TE = torch.zeros_like(probs_TE).scatter(1, routes_TK, weights_TK.to(probs_TE.dtype))
        return probs_TE, torch.zeros_like(map_TE).scatter(1, routes_TK, True)


def find_routers(model: torch.nn.Module) -> dict[str, Router]:
    """The model's routers by their names, in the order of its modules. Raises ConfigError where there is none."""
    found: dict[str, Router] = {}
    for parent_name, parent in model.named_modules():
        for name, module in parent.named_children():
            router = _as_router(name, module, parent)
            if router is not None:
                found[f"{parent_name}.{name}".lstrip(".")] = router
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules() if NAMES.search(type(module).__name__)})
        raise ConfigError(
            f"{type(model).__name__} has no router of a known form ({', '.join(kinds) or 'nothing is called one'}); "
            "known are those of transformers' MoE models with num_experts and top_k, and megatron-core's TopKRouter"
        )
    return found


def _as_router(name: str, module: torch.nn.Module, parent: torch.nn.Module) -> Router | None:
    if all(hasattr(module, part) for part in ("gating", "routing", "topk")):
        return MegatronRouter(module)
    if NAMES.search(type(module).__name__) and hasattr(module, "top_k") and hasattr(module, "num_experts"):
        return TopKRouter(module)
    topk, experts = getattr(parent, "top_k", None), getattr(parent, "num_experts", None)
    linear = name in ("gate", "router") and isinstance(module, torch.nn.Linear)
    biased = any(getattr(parent, part, None) is not None for part in BIASES)  # so its choice is not that of the softmax
    if linear and not biased and isinstance(topk, int) and isinstance(experts, int) and module.out_features == experts:
        return LinearGate(module, topk)
    return None


def _count(holder: Any, name: str) -> int:
    return getattr(holder, name, None) or 1


def _bias(value: Any) -> torch.Tensor | None:
    return value.detach().flatten() if isinstance(value, torch.Tensor) else None


def _as_logits(given_TE: torch.Tensor) -> torch.Tensor:
    """Logits as they are; of probabilities the log, whose softmax they are."""
    sums_T = given_TE.float().sum(dim=1)
    if not ((given_TE >= 0).all() and ((sums_T - 1).abs() <= 2 * torch.finfo(given_TE.dtype).eps + 1e-4).all()):
        return given_TE
    return given_TE.float().clamp_min(torch.finfo(torch.float32).tiny).log()


def _form(output: Any) -> str:
    if isinstance(output, tuple):
        return f"({', '.join(_form(one) for one in output)})"
    return str(list(output.shape)) if isinstance(output, torch.Tensor) else type(output).__name__
