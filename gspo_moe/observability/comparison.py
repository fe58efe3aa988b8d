"""Statistics over seeds: bootstrap intervals, paired differences between arms, collapse.

Shape letters: N seeds, D anything (steps, say), B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
MOST_DRAWS = 10_000_000  # held at once


@dataclass(frozen=True)
class Estimate:
    """A mean over `seeds` values and its bootstrap interval, which is NaN for fewer than two values."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Band:
    """An `Estimate` at each of D places: float64 [D] each, and how many seeds have a value there, int64 [D]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: np.ndarray


@dataclass(frozen=True)
class CollapseRule:
    """A run has collapsed when its reward falls below a share of its running best and stays there to the end.

    The reward is a trailing mean over `window` steps, its running best the largest such mean so far; a best of zero or
    less cannot be fallen from. At least `patience` steps must lie below.
    """

    share: float = 0.5
    window: int = 5
    patience: int = 10

    def __str__(self) -> str:
        return (
            f"the mean reward of the last {self.window} steps falls below {self.share:.0%} of its running best "
            f"and stays below until the run's last step, for {self.patience} steps or more"
        )


def bootstrap_interval(samples_ND: np.ndarray, *, level: float = LEVEL, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over the first axis (Efron 1979); NaN for fewer than two samples.

    samples_ND: float64 [N] or [N, D], finite. Returns low and high, [] or [D]. With few samples the interval is too
    narrow: it cannot leave the range of the samples. The same draws serve every place, so that a band is smooth.
    """
    samples_ND = np.asarray(samples_ND, dtype=np.float64)
    count = len(samples_ND)
    if count < 2:
        nothing = np.full(samples_ND.shape[1:], np.nan)
        return nothing, nothing
    random, shares = np.random.default_rng(seed), np.full(count, 1 / count)
    at_once = min(RESAMPLES, max(1, MOST_DRAWS // count))
    sizes = (min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once))
    means_BD = np.concatenate([random.multinomial(count, shares, size=size) @ samples_ND / count for size in sizes])
    low, high = np.quantile(means_BD, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def estimate(values: Sequence[float] | np.ndarray, *, level: float = LEVEL) -> Estimate:
    """Mean and interval over the finite ones of one value a seed; all NaN where there is none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return Estimate(np.nan, np.nan, np.nan, 0)
    low, high = bootstrap_interval(finite, level=level)
    return Estimate(float(finite.mean()), float(low), float(high), len(finite))


def band(values_ND: np.ndarray, *, level: float = LEVEL) -> Band:
    """Mean and pointwise interval over seeds at each place, over the seeds that are finite there.

    values_ND: float64 [N, D], NaN where a seed has no value.
    """
    known_ND = np.isfinite(values_ND)
    seeds = known_ND.sum(axis=0)
    mean, low, high = (np.full(values_ND.shape[1], np.nan) for _ in range(3))
    patterns, pattern_of = np.unique(known_ND, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if pattern.any():
            places = np.flatnonzero(pattern_of.ravel() == number)
            present = values_ND[np.ix_(pattern, places)]
            mean[places] = present.mean(axis=0)
            low[places], high[places] = bootstrap_interval(present, level=level)
    return Band(mean, low, high, seeds)


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float], *, level: float = LEVEL) -> Estimate:
    """Mean and interval of arm - baseline over the seeds that both have; one finite value by seed in each mapping."""
    return estimate([arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())], level=level)


def find_collapse(rewards: np.ndarray, rule: CollapseRule | None = None) -> int | None:
    """The index in `rewards` (one a step, ascending) from which on `rule` holds, None where it does not.

    Values that are not finite are taken for zero reward: a run that ends in NaN has not kept its reward.
    """
    rule = rule or CollapseRule()
    if len(rewards) < rule.window:
        return None
    known = np.nan_to_num(np.asarray(rewards, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    means = np.convolve(known, np.full(rule.window, 1 / rule.window), "valid")
    best = np.maximum.accumulate(means)
    stands = np.flatnonzero((best <= 0) | (means >= rule.share * best))
    below = int(stands[-1]) + 1 if len(stands) else 0
    return below + rule.window - 1 if len(means) - below >= rule.patience else None
