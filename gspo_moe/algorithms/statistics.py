"""Statistics that add up over micro-batches and ranks.

They are detached float64 tensors where the loss was computed: nothing waits for the device until `to_metrics`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

Parts = dict[str, torch.Tensor]
SQUARED = "/squared_deviation"  # which overflows where what it is the square of does not


def at_once(parts: Parts, through: Callable[[torch.Tensor], torch.Tensor]) -> Parts:
    """The parts, after all of them went through a function of one flat tensor."""
    if not parts:
        return {}
    whole = through(torch.cat([value.reshape(-1) for value in parts.values()]))
    pieces = whole.split([value.numel() for value in parts.values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(parts.items(), pieces, strict=True)}


@dataclass(frozen=True)
class Mergeable:
    """Sums and maxima of any number of samples.

    sums: float64 tensors (scalars, or vectors with one entry a layer) that combine by addition.
    maxima: float64 scalars that combine by maximum; minima are stored negated.
    Every instance of one class has the same keys, so a reduction over ranks may rely on their order.
    """

    sums: Parts
    maxima: Parts

    def merge(self, other: Self) -> Self:
        """The statistics of both samples together."""
        assert self.sums.keys() == other.sums.keys()
        assert self.maxima.keys() == other.maxima.keys()
        assert all(value.shape == other.sums[name].shape for name, value in self.sums.items())
        return type(self)(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: torch.maximum(value, other.maxima[name]) for name, value in self.maxima.items()},
        )

    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite, squares apart, and no maximum NaN or infinitely large; waits for it."""
        sums = [value for name, value in self.sums.items() if not name.endswith(SQUARED)]
        # A maximum over nothing is -inf.
        return all(bool(value.isfinite().all()) for value in sums) and all(
            bool((value < torch.inf).all()) for value in self.maxima.values()
        )

    def cpu(self) -> Self:
        """The same on the CPU, for sending to another process; waits for the device once for each kind of parts."""
        return type(self)(*(at_once(parts, torch.Tensor.cpu) for parts in (self.sums, self.maxima)))


class Statistics(Mergeable, ABC):
    """Parts of a set of metrics."""

    @abstractmethod
    def to_metrics(self) -> Mapping[str, float | list[float]]:
        """The metrics as Python numbers; waits for the device."""


def spread(name: str, log_ratio: torch.Tensor, weight: torch.Tensor) -> tuple[Parts, Parts]:
    """Sums and maxima from which `spread_metrics` reads mean, std and extremes of exp(log_ratio).

    log_ratio, weight: float64 [n]; n may be 0. weight: how much of each one is counted, 0 leaves it out.
    Moments are taken about 1, where ratios lie, so that a std of 1e-6 survives the subtraction.
    """
    deviation = torch.where(weight > 0, torch.expm1(log_ratio), 0.0)
    nothing = deviation.new_full((1,), -torch.inf)

    def largest(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.where(weight > 0, values, -torch.inf), nothing]).max()

    return (
        {
            f"{name}/deviation": (weight * deviation).sum(),
            f"{name}{SQUARED}": (weight * deviation.square()).sum(),
        },
        {f"{name}/max": largest(deviation) + 1.0, f"{name}/negated_min": largest(-deviation) - 1.0},
    )


def spread_metrics(name: str, prefix: str, statistics: Statistics, count: float) -> dict[str, float]:
    """`{prefix}_mean`, `_std` (population: ddof 0), `_min` and `_max` of ratios; `count`: the sum of their weights."""
    deviation = statistics.sums[f"{name}/deviation"].item() / count
    squared = statistics.sums[f"{name}{SQUARED}"].item() / count
    # Squares that overflow leave infinity, not infinity less infinity.
    variance = max(squared - deviation * deviation, 0.0) if math.isfinite(squared) else squared
    return {
        f"{prefix}_mean": 1.0 + deviation,
        f"{prefix}_std": math.sqrt(variance),
        f"{prefix}_min": -statistics.maxima[f"{name}/negated_min"].item(),
        f"{prefix}_max": statistics.maxima[f"{name}/max"].item(),
    }
