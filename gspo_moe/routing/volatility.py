"""How much the router's choice moved between two passes over the same tokens (SPEC section 4).

Shape letters: T tokens, L MoE layers, K experts a token, N sequences, E experts, B margin bins. Experts of one token
and layer are distinct and their order has no meaning. The paper behind the question is arXiv 2507.18071, section 5.3.
"""

from __future__ import annotations

import math

import torch

from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.errors import DataError

# Bins of the margin p_(K) - p_(K+1): below the first edge, between the edges, from the last one on.
MARGIN_EDGES = (1e-4, 1e-3, 1e-2, 1e-1)
NORMAL_95 = 1.959963984540054  # the standard normal's 97.5 % point


def overlap_TL(old_TLK: torch.Tensor, new_TLK: torch.Tensor) -> torch.Tensor:
    """|E_old & E_new|: how many experts both passes picked, int64 [T, L].

    old_TLK, new_TLK: expert ids of any integer dtype. Raises DataError for shapes that differ or lack T, L or K.
    """
    if old_TLK.shape != new_TLK.shape or old_TLK.ndim != 3 or 0 in old_TLK.shape[1:]:
        raise DataError(
            f"routes must both be [tokens, layers, topk] with a layer and an expert at least, got old "
            f"{list(old_TLK.shape)} and new {list(new_TLK.shape)}; record both passes over the same tokens"
        )
    if any(routes.is_floating_point() or routes.dtype == torch.bool for routes in (old_TLK, new_TLK)):
        raise DataError(f"routes must be integer ids, got {old_TLK.dtype} and {new_TLK.dtype}; pass top-k indices")
    shared_TLK = torch.zeros(new_TLK.shape, dtype=torch.bool, device=new_TLK.device)
    for slot_TL1 in old_TLK.split(1, dim=-1):  # K passes over [T, L, K] instead of one over [T, L, K, K]
        shared_TLK |= new_TLK == slot_TL1
    return shared_TLK.sum(dim=-1)


def set_change_NL(
    old_TLK: torch.Tensor, new_TLK: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int, num_experts: int
) -> torch.Tensor:
    """1 - |U_new & U_old| / |U_old| of each sequence and layer, float64 [N, L]; 0 for a sequence without tokens.

    U is the union of a sequence's experts over its tokens. sequence_T: int64, the index in N of each token's sequence.
    """
    old_NLE, new_NLE = (_unions(routes, sequence_T, num_sequences, num_experts) for routes in (old_TLK, new_TLK))
    lost_NL = (old_NLE & ~new_NLE).sum(dim=-1)
    return lost_NL.double() / old_NLE.sum(dim=-1).clamp(min=1)


def _unions(routes_TLK: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int, num_experts: int) -> torch.Tensor:
    layers = routes_TLK.shape[1]
    layer_L1 = torch.arange(layers, device=routes_TLK.device)[:, None]
    flat_TLK = (sequence_T[:, None, None] * layers + layer_L1) * num_experts + routes_TLK
    union = torch.zeros(num_sequences * layers * num_experts, dtype=torch.bool, device=routes_TLK.device)
    return union.index_fill(0, flat_TLK.flatten(), True).view(num_sequences, layers, num_experts)


def log_shift_TL(old_log_probs_TLK: torch.Tensor, new_log_probs_TLK: torch.Tensor) -> torch.Tensor:
    """-mean_{e in E_old} |delta log p_e|, float64 [T, L]: one layer's part of the router shift (2510.23027).

    Both: the router's log-probs (nats) of the *old* experts, in the same order. exp of its mean over layers is gamma_t.
    """
    difference = new_log_probs_TLK.double() - old_log_probs_TLK.double()
    return difference.abs().mean(dim=-1).neg()


class RouteSums(Statistics):
    """Route changes of any number of packs."""

    @classmethod
    def from_overlap(cls, overlap_TL: torch.Tensor, topk: int) -> RouteSums:
        """overlap_TL: integers [T, L] of `overlap_TL`, all layers of the model; topk: K."""
        flipped_TL = overlap_TL < topk
        tokens = torch.full((), overlap_TL.shape[0], dtype=torch.float64, device=overlap_TL.device)
        return cls(
            {
                "tokens": tokens,
                "slot_change_L": (1.0 - overlap_TL.double() / topk).sum(dim=0),
                "flips_L": flipped_TL.double().sum(dim=0),
                "flipped_tokens": flipped_TL.any(dim=1).double().sum(),
            },
            {},
        )

    def to_metrics(self) -> dict[str, float | list[float]]:
        """The first four figures of SPEC section 4 and two of them by layer; empty when no token was compared."""
        tokens = self.sums["tokens"].item()
        if tokens == 0:
            return {}
        slot_change_L = self.sums["slot_change_L"] / tokens
        flip_rate_L = self.sums["flips_L"] / tokens
        return {
            "slot_change": slot_change_L.mean().item(),
            "flip_rate": flip_rate_L.mean().item(),
            "any_layer_flip": self.sums["flipped_tokens"].item() / tokens,
            "flipped_layers_per_token": flip_rate_L.sum().item(),
            "slot_change_by_layer": slot_change_L.tolist(),
            "flip_rate_by_layer": flip_rate_L.tolist(),
        }


class PairSums(RouteSums):
    """All figures of SPEC section 4 for one pair of policies, of any number of packs."""

    @classmethod
    def of_pack(
        cls,
        overlap_TL: torch.Tensor,
        set_change_NL: torch.Tensor,
        sequence_T: torch.Tensor,
        topk: int,
        log_shift_TL: torch.Tensor | None = None,
        margin_TL: torch.Tensor | None = None,
    ) -> PairSums:
        """Of the functions above, with all layers of the model; margin_TL: the old policy's, in [0, 1].

        sequence_T: int64, the index in N of each token's sequence.
        """
        base = RouteSums.from_overlap(overlap_TL, topk).sums
        flipped_TL = overlap_TL < topk
        per_token_T = 1.0 - overlap_TL.double().mean(dim=1) / topk
        zeros_N = set_change_NL.new_zeros(set_change_NL.shape[0])
        change_N = zeros_N.index_add(0, sequence_T, per_token_T)
        tokens_N = zeros_N.index_add(0, sequence_T, torch.ones_like(per_token_T))
        bins = len(MARGIN_EDGES) + 1
        layers = overlap_TL.shape[1]
        nothing = base["tokens"] * 0.0
        more = {
            "sequences": (tokens_N > 0).double().sum(),
            "set_change_L": set_change_NL.sum(dim=0),
            "tokens_squared": tokens_N.square().sum(),
            "change_squared": change_N.square().sum(),
            "change_tokens": (change_N * tokens_N).sum(),
            "scored": nothing,
            "shift": nothing,
            "margin_L": nothing.expand(layers),
            "binned_LB": nothing.expand(layers, bins),
            "binned_flips_LB": nothing.expand(layers, bins),
        }
        if log_shift_TL is not None and margin_TL is not None:
            more |= _scored(flipped_TL, log_shift_TL, margin_TL)
        return cls({**base, **more}, {})

    def interval(self) -> float:
        """Half the 95 % interval of slot_change, sequences taken as a sample: the ratio estimator's normal one."""
        sequences, tokens = self.sums["sequences"].item(), self.sums["tokens"].item()
        if sequences < 2:
            return math.nan
        value = self.sums["slot_change_L"].mean().item() / tokens
        squares = (
            self.sums["change_squared"]
            - 2 * value * self.sums["change_tokens"]
            + value**2 * self.sums["tokens_squared"]
        ).item()
        return NORMAL_95 * math.sqrt(max(squares, 0.0) * sequences / (sequences - 1)) / tokens

    def to_metrics(self) -> dict[str, float | list[float]]:
        """Adds to `RouteSums`: response_set_change, router_margin, router_shift and flip_rate_by_margin.

        flip_rate_by_margin: [B] of all layers, NaN for an empty bin; by layer response_set_change and router_margin.
        The three that need scores are left out where there were none.
        """
        metrics = super().to_metrics()
        if not metrics:
            return {}
        set_change_L = self.sums["set_change_L"] / self.sums["sequences"]
        metrics["response_set_change"] = set_change_L.mean().item()
        metrics["response_set_change_by_layer"] = set_change_L.tolist()
        scored = self.sums["scored"].item()
        if scored:
            margin_L = self.sums["margin_L"] / scored
            metrics["router_shift"] = self.sums["shift"].item() / scored
            metrics["router_margin"] = margin_L.mean().item()
            metrics["router_margin_by_layer"] = margin_L.tolist()
            flips_B = self.sums["binned_flips_LB"].sum(dim=0) / self.sums["binned_LB"].sum(dim=0)
            metrics["flip_rate_by_margin"] = flips_B.tolist()
        return metrics


def _scored(flipped_TL: torch.Tensor, log_shift_TL: torch.Tensor, margin_TL: torch.Tensor) -> dict[str, torch.Tensor]:
    edges = torch.tensor(MARGIN_EDGES, dtype=margin_TL.dtype, device=margin_TL.device)
    layers, bins = margin_TL.shape[1], len(MARGIN_EDGES) + 1
    bin_TL = torch.bucketize(margin_TL.contiguous(), edges, right=True)
    cell_TL = bin_TL + bins * torch.arange(layers, device=bin_TL.device)

    def counts(cells: torch.Tensor) -> torch.Tensor:
        return torch.bincount(cells.flatten(), minlength=layers * bins).view(layers, bins).double()

    return {
        "scored": torch.full((), margin_TL.shape[0], dtype=torch.float64, device=margin_TL.device),
        "shift": log_shift_TL.mean(dim=1).exp().sum(),
        "margin_L": margin_TL.sum(dim=0),
        "binned_LB": counts(cell_TL),
        "binned_flips_LB": counts(cell_TL[flipped_TL]),
    }


def volatility(old_routes: torch.Tensor, new_routes: torch.Tensor) -> dict[str, float | list[float]]:
    """The metrics of `RouteSums.to_metrics` for one pair of recordings.

    old_routes, new_routes: expert ids [tokens, layers, topk] of response tokens. Empty for zero tokens; raises
    DataError as `overlap_TL` does.
    """
    return RouteSums.from_overlap(overlap_TL(old_routes, new_routes), old_routes.shape[-1]).to_metrics()
