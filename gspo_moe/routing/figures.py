"""Figures of routing as a run's files take them: by name for the log, by layer for the file of layers.

Shape letters: A all MoE layers, B margin bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gspo_moe.routing.volatility import PairSums


@dataclass
class Figures:
    """metrics: for the log. layers: arrays [A], or [A, B], for the file of per-layer figures."""

    metrics: dict[str, float] = field(default_factory=dict)
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, other: Figures) -> None:
        self.metrics |= other.metrics
        self.layers |= other.layers


def pair_figures(pair: str, sums: PairSums, floor: PairSums | None) -> Figures:
    """A pair's figures and, where it is known, its noise floor's; empty where no token was compared."""
    figures = Figures()
    for name, value in sums.to_metrics().items():
        if name == "flip_rate_by_margin":
            assert isinstance(value, list)
            bins = {f"routing/{pair}/flip_rate_by_margin/bin_{i}": rate for i, rate in enumerate(value)}
            figures.metrics |= {key: rate for key, rate in bins.items() if rate == rate}
            figures.layers[f"routing/{pair}/margin_tokens"] = sums.sums["binned_LB"].cpu().numpy()
            figures.layers[f"routing/{pair}/margin_flips"] = sums.sums["binned_flips_LB"].cpu().numpy()
        elif isinstance(value, list):
            figures.layers[f"routing/{pair}/{name.removesuffix('_by_layer')}"] = np.array(value)
        else:
            figures.metrics[f"routing/{pair}/{name}"] = value
    for name, value in ({} if floor is None else floor.to_metrics()).items():
        if name == "slot_change":
            assert isinstance(value, float)
            figures.metrics[f"routing/{pair}/noise_floor/slot_change"] = value
        elif name == "slot_change_by_layer":
            figures.layers[f"routing/{pair}/noise_floor/slot_change"] = np.array(value)
    return figures


def with_interval(figures: Figures, pair: str, sums: PairSums) -> Figures:
    """Adds the 95 % interval of slot_change over sequences, where these are a sample."""
    half, value = sums.interval(), figures.metrics.get(f"routing/{pair}/slot_change")
    if value is not None and half == half:
        figures.metrics[f"routing/{pair}/slot_change_low"] = max(value - half, 0.0)
        figures.metrics[f"routing/{pair}/slot_change_high"] = min(value + half, 1.0)
    return figures
