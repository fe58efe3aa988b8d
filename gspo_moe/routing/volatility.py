"""How much the router's choice moved between two passes over the same tokens (SPEC section 4).

Shape letters: T tokens, L MoE layers, K experts a token. Experts of one token and layer are distinct and their order
has no meaning. The paper behind the question is arXiv 2507.18071, section 5.3.
"""

from __future__ import annotations

import torch

from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.errors import DataError


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


def volatility(old_routes: torch.Tensor, new_routes: torch.Tensor) -> dict[str, float | list[float]]:
    """The metrics of `RouteSums.to_metrics` for one pair of recordings.

    old_routes, new_routes: expert ids [tokens, layers, topk] of response tokens. Empty for zero tokens; raises
    DataError as `overlap_TL` does.
    """
    return RouteSums.from_overlap(overlap_TL(old_routes, new_routes), old_routes.shape[-1]).to_metrics()
