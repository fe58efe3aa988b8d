"""What a layer of a decode step computes: by PyTorch anywhere, by compiled kernels on the CPU in float32.

Both take and change the same tensors and differ by rounding alone; the operators are those of the training forward.

Weights are held in the form that their product is fastest with, which is made once for many steps.

Shape letters: N tokens, one a row of the cache from the first, H hidden, O outputs, G this rank's key heads, X a key
head's query heads, its key and its value, D head size, B rows of the cache, P its positions, K experts a token, E
experts here, C choices of experts, by expert, Y heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from gspo_moe.kernels import decode
from gspo_moe.model.attention import rotate
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.model.spec import normalized


@dataclass(frozen=True)
class HeadNorms:
    """Weights of queries and keys, [D]."""

    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class Surroundings:
    """What all layers share in a step. cos_PD, sin_PD: rotary factors. used: how many positions are looked at."""

    positions_N: torch.Tensor
    cos_PD: torch.Tensor
    sin_PD: torch.Tensor
    used: int


@dataclass(frozen=True)
class Weights:
    """Of a linear layer, as `Arithmetic.hold` made them of [O, H]."""

    held: torch.Tensor
    outputs: int


@dataclass(frozen=True)
class Experts:
    """Of a layer, those here; both layers' weights as `Arithmetic.hold_experts` made them."""

    module: GroupedExperts
    first: torch.Tensor
    second: torch.Tensor


class Arithmetic(Protocol):
    epsilon: float

    def hold(self, weight_OH: torch.Tensor) -> Weights: ...

    def hold_experts(self, module: GroupedExperts) -> Experts: ...

    def begin(self, around: Surroundings) -> None:
        """Takes what the next step's layers share."""

    def norm(self, hidden_NH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor: ...

    def linear(self, hidden_NH: torch.Tensor, weights: Weights) -> torch.Tensor: ...

    def attend(
        self, qkv_NGXD: torch.Tensor, norms: HeadNorms, cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Attention [N, G (X - 2) D] of each token to its row up to itself; cache: [B, G, P, D], which it enters."""
        ...

    def mix(
        self,
        experts: Experts,
        hidden_NH: torch.Tensor,
        weights_NK: torch.Tensor,
        routes_NK: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        """The weighted sum [N, H], fp32, over those of each token's experts which are here: from `start` on."""
        ...


class Kernels:
    """By `kernels.decode`, with copies of the weights in panels."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._around: Surroundings

    def hold(self, weight_OH: torch.Tensor) -> Weights:
        return Weights(decode.pack(weight_OH), len(weight_OH))

    def hold_experts(self, module: GroupedExperts) -> Experts:
        return Experts(module, decode.pack(module.linear_fc1.weight), decode.pack(module.linear_fc2.weight))

    def begin(self, around: Surroundings) -> None:
        self._around = around

    def norm(self, hidden_NH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        return decode.norm(hidden_NH, weight_H, self.epsilon)

    def linear(self, hidden_NH: torch.Tensor, weights: Weights) -> torch.Tensor:
        return decode.linear(hidden_NH, weights.held, weights.outputs)

    def attend(
        self, qkv_NGXD: torch.Tensor, norms: HeadNorms, cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        around = self._around
        factors = (around.cos_PD, around.sin_PD)
        return decode.attention(qkv_NGXD, (norms.query, norms.key), self.epsilon, factors, around.positions_N, cache)

    def mix(
        self,
        experts: Experts,
        hidden_NH: torch.Tensor,
        weights_NK: torch.Tensor,
        routes_NK: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        return decode.experts(hidden_NH, weights_NK.float(), routes_NK, experts.first, experts.second, start)


class Operators:
    """By PyTorch's operators. The host learns nothing from a GPU."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._around: Surroundings
        self._factors: tuple[torch.Tensor, torch.Tensor]
        self._bias_N11P: torch.Tensor
        self._rows: torch.Tensor

    def hold(self, weight_OH: torch.Tensor) -> Weights:
        return Weights(weight_OH, len(weight_OH))

    def hold_experts(self, module: GroupedExperts) -> Experts:
        return Experts(module, module.linear_fc1.weight, module.linear_fc2.weight)

    def begin(self, around: Surroundings) -> None:
        positions_N, cos_PD = around.positions_N, around.cos_PD
        place = positions_N.device
        self._around = around
        self._factors = (cos_PD[positions_N], around.sin_PD[positions_N])
        self._rows = torch.arange(len(positions_N), device=place)
        hidden_NP = torch.arange(around.used, device=place) > positions_N[:, None]
        bias_NP = cos_PD.new_zeros(hidden_NP.shape).masked_fill_(hidden_NP, -torch.inf)
        self._bias_N11P = bias_NP[:, None, None]

    def norm(self, hidden_NH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        return normalized(hidden_NH, weight_H, self.epsilon)

    def linear(self, hidden_NH: torch.Tensor, weights: Weights) -> torch.Tensor:
        return F.linear(hidden_NH, weights.held)

    def attend(
        self, qkv_NGXD: torch.Tensor, norms: HeadNorms, cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        normed = self.norm(qkv_NGXD[:, :, :-2], norms.query), self.norm(qkv_NGXD[:, :, -2:-1], norms.key)
        heads_NYD = torch.cat(normed, dim=2).flatten(1, 2)
        heads_NGXD = rotate(heads_NYD, *self._factors).unflatten(1, (qkv_NGXD.shape[1], -1))
        for buffer, new_NGD in zip(cache, (heads_NGXD[:, :, -1], qkv_NGXD[:, :, -1]), strict=True):
            buffer[self._rows, :, self._around.positions_N] = new_NGD
        keys, values = (buffer[: len(qkv_NGXD), :, : self._around.used] for buffer in cache)
        # The query heads of one key head lie beside each other as queries do, so that no key is copied for each.
        queries = heads_NGXD[:, :, :-1]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._bias_N11P).flatten(1)

    def mix(
        self,
        experts: Experts,
        hidden_NH: torch.Tensor,
        weights_NK: torch.Tensor,
        routes_NK: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        topk, count = routes_NK.shape[1], experts.first.shape[0]
        away_C, local_C = None, routes_NK.flatten()
        if count < experts.module.config.num_moe_experts:
            local_C = local_C - start
            away_C = (local_C < 0) | (local_C >= count)
            local_C = local_C.masked_fill(away_C, count)
        expert_C, order_C = local_C.sort(stable=True)
        ends_E = torch.searchsorted(expert_C, torch.arange(count, device=expert_C.device), right=True, out_int32=True)
        rows_CH = experts.module.run(hidden_NH[order_C // topk], ends_E, weights_NK.flatten()[order_C])
        found_CH = torch.empty_like(rows_CH)
        found_CH[order_C] = rows_CH
        if away_C is not None:
            found_CH.masked_fill_(away_C[:, None], 0)
        return found_CH.view(len(routes_NK), topk, hidden_NH.shape[1]).sum(1, dtype=torch.float32)


def arithmetic_for(weight: torch.Tensor, epsilon: float) -> Arithmetic:
    """The fastest for a model with such weights."""
    return Kernels(epsilon) if decode.suits(weight) else Operators(epsilon)
