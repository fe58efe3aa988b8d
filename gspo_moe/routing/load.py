"""How evenly the router spreads tokens over experts (SPEC section 4).

Shape letters: T tokens, L MoE layers, K experts a token, E experts.
"""

from __future__ import annotations

import torch

from gspo_moe.algorithms.statistics import Statistics


def expert_load(routes_TLK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens each expert of each layer got, int64 [L, E]; routes_TLK: expert ids of any integer dtype."""
    load_LE = torch.zeros(routes_TLK.shape[1], num_experts, dtype=torch.int64, device=routes_TLK.device)
    picked_LX = routes_TLK.long().transpose(0, 1).flatten(1)
    return load_LE.scatter_add_(1, picked_LX, torch.ones_like(picked_LX))


class LoadSums(Statistics):
    """Expert load of any number of packs."""

    @classmethod
    def from_load(cls, load_LE: torch.Tensor) -> LoadSums:
        """load_LE: counts of `expert_load`, all layers of the model."""
        return cls({"load_LE": load_LE.double()}, {})

    def to_metrics(self) -> dict[str, float]:
        """The three figures of the load of SPEC section 4, by layer and as means over layers; empty without a token.

        max_violation: max / mean - 1. cv: std (ddof 0) / mean. entropy: of the shares p, -sum p log p, in nats.
        """
        load_LE = self.sums["load_LE"]
        if not load_LE.any():
            return {}
        mean_L = load_LE.mean(dim=1)
        share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
        figures = {
            "max_violation": load_LE.amax(dim=1) / mean_L - 1.0,
            "cv": load_LE.std(dim=1, correction=0) / mean_L,
            "entropy": torch.special.entr(share_LE).sum(dim=1),
        }
        metrics: dict[str, float] = {}
        for name, value_L in figures.items():
            metrics[f"routing/load/{name}"] = value_L.mean().item()
            metrics |= {f"routing/load/{name}/layer_{i:02d}": value for i, value in enumerate(value_L.tolist())}
        return metrics
