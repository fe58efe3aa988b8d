"""Whether figures of a long run stay flat: growth a step with its uncertainty, and what may grow by how much. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WARM_UP = 1 / 3  # of the steps, which are left out: caches fill, allocators find their size
BLOCKS = 20  # whose means are fitted: a saw-tooth of checkpoints and evaluations is none of the noise between them
SURE = 2.0  # standard errors
PER = 1000  # steps
# The most that a figure may grow in 1,000 steps; of seconds, as a share of their mean.
ALLOWED = {"memory_mib": 2.0, "children_memory_mib": 2.0, "handles": 1.0, "threads": 1.0, "children": 1.0}
ALLOWED_SHARE = {"step_cpu_seconds": 0.05}


@dataclass(frozen=True)
class Trend:
    """Growth of a figure in 1,000 steps, least squares over the means of blocks, and its standard error.

    mean: of the blocks. allowed: the most that it may grow.
    """

    growth: float
    error: float
    mean: float
    allowed: float

    @property
    def grows(self) -> bool:
        """Surely beyond what is allowed."""
        return self.growth - SURE * self.error > self.allowed

    @property
    def is_sure(self) -> bool:
        """Whether the run was long enough to tell that it does not."""
        return self.growth + SURE * self.error <= self.allowed


def blocks(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Mean step and mean value of `BLOCKS` equal stretches of steps behind the warm-up; empty ones are left out."""
    first = steps[0] + (steps[-1] - steps[0]) * WARM_UP
    width = (steps[-1] - first) / BLOCKS
    found: list[list[tuple[float, float]]] = [[] for _ in range(BLOCKS)]
    for step, value in zip(steps, values, strict=True):
        if step >= first and width > 0:
            found[min(int((step - first) / width), BLOCKS - 1)].append((step, value))
    means = [tuple(sum(column) / len(block) for column in zip(*block, strict=True)) for block in found if block]
    return [step for step, _ in means], [value for _, value in means]


def trend(name: str, steps: Sequence[float], values: Sequence[float]) -> Trend:
    """Raises ValueError for fewer than three blocks, of which no uncertainty can be told."""
    x, y = blocks(steps, values)
    if len(x) < 3:
        raise ValueError(f"{len(x)} stretches of steps with figures are too few; run for longer")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(left / (len(x) - 2) / spread)
    allowed = ALLOWED[name] if name in ALLOWED else ALLOWED_SHARE[name] * mean_y
    return Trend(PER * slope, PER * error, mean_y, allowed)


def trends(steps: Sequence[float], figures: Mapping[str, Sequence[float]]) -> dict[str, Trend]:
    return {name: trend(name, steps, values) for name, values in figures.items()}


def table(found: Mapping[str, Trend]) -> str:
    """A line a figure: its mean, its growth in 1,000 steps, what is allowed, and what that says."""
    lines = [f"{'':<20} {'mean':>10} {'growth in 1,000 steps':>26} {'allowed':>9}"]
    for name, one in found.items():
        verdict = "GROWS" if one.grows else "flat" if one.is_sure else "not told apart"
        growth = f"{one.growth:+.3f} +- {SURE * one.error:.3f}"
        lines.append(f"{name:<20} {one.mean:>10.3f} {growth:>26} {one.allowed:>9.3f}  {verdict}")
    return "\n".join(lines)
