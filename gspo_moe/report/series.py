"""From an arm's runs to curves, heat maps and single values, with their intervals over seeds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gspo_moe.observability import Run
from gspo_moe.observability.catalog import CATALOG
from gspo_moe.observability.comparison import band, estimate
from gspo_moe.report.collect import Arm
from gspo_moe.report.curves import moving_mean
from gspo_moe.report.figures import Curve, Dot

POINTS_DRAWN = 400
COLUMNS_DRAWN = 120


def unit_of(metric: str) -> str:
    """The catalog's unit; empty for a metric that the catalog does not have."""
    return CATALOG[metric].unit if metric in CATALOG else ""


def step_curve(arm: Arm, metric: str, *, smooth: bool) -> Curve | None:
    """The arm's `metric` over steps; None where no seed has a finite value of it."""
    present = [cell for cell in arm.cells if metric in cell.run.names]
    if not present:
        return None
    steps = np.unique(np.concatenate([cell.run.steps(metric) for cell in present]))
    raw = np.full((len(present), len(steps)), np.nan)
    smoothed = raw.copy()
    for row, cell in enumerate(present):
        places = np.searchsorted(steps, cell.run.steps(metric))
        values = cell.run.values(metric)
        raw[row, places] = values
        smoothed[row, places] = moving_mean(values) if smooth else values
    seeds = band(smoothed)
    if not np.isfinite(seeds.mean).any():
        return None
    thinned, mean_raw = _thinned(len(steps)), mean_of_finite(raw)
    zeros = steps[mean_raw == 0].astype(np.float64)
    return Curve(
        arm.name,
        steps[thinned].astype(np.float64),
        seeds.mean[thinned],
        seeds.low[thinned],
        seeds.high[thinned],
        seeds.seeds[thinned],
        mean_raw[thinned] if smooth else None,
        zeros[_thinned(len(zeros))],
    )


def are_zero(curves: Sequence[Curve]) -> bool:
    """Whether no point of any of them is another number than 0."""
    return not any(np.nan_to_num(curve.mean).any() for curve in curves)


def _thinned(count: int) -> np.ndarray:
    """Indices of up to POINTS_DRAWN of `count` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS_DRAWN)).round().astype(int))


def count_curve(arm: Arm, pattern: re.Pattern[str]) -> Curve | None:
    """Means over the run of the metrics that `pattern` matches whole, against the number in its first group."""
    numbered = sorted((int(match[1]), name) for name in arm.names if (match := pattern.fullmatch(name)))
    if not numbered:
        return None
    values = np.array([[cell.run.mean(name) for _, name in numbered] for cell in arm.cells])
    if not np.isfinite(values).any():
        return None
    seeds = band(values)
    return Curve(arm.name, np.array([float(n) for n, _ in numbered]), seeds.mean, seeds.low, seeds.high, seeds.seeds)


@dataclass(frozen=True)
class Heat:
    """Figures by layer and step, mean over seeds; long runs are averaged in blocks of steps.

    steps: float64 [S], the middle of each block. columns: a block's step, or its first and last. values_LS: float64.
    """

    steps: np.ndarray
    columns: tuple[str, ...]
    values_LS: np.ndarray

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(str(layer) for layer in range(len(self.values_LS)))


def heat(arm: Arm, metric: str) -> Heat | None:
    """The metric's figures by layer; None without any."""
    found = [series for cell in arm.cells if (series := layer_series(cell.run, metric)) is not None]
    depth = max((values.shape[1] for _, values in found), default=0)
    found = [(steps, values) for steps, values in found if values.shape[1] == depth and len(steps)]
    if not found:
        return None
    steps = np.unique(np.concatenate([own for own, _ in found]))
    values = np.full((len(found), depth, len(steps)), np.nan)
    for row, (own, values_SL) in enumerate(found):
        values[row][:, np.searchsorted(steps, own)] = values_SL.T
    block = -(-len(steps) // COLUMNS_DRAWN)
    starts = np.arange(0, len(steps), block)
    mean_LS = mean_of_finite(values)
    blocks_LS = np.stack([mean_of_finite(mean_LS[:, start : start + block].T) for start in starts], axis=1)
    edges_S2 = np.stack([steps[starts], steps[np.minimum(starts + block, len(steps)) - 1]], axis=1)
    columns = tuple(str(low) if low == high else f"{low} to {high}" for low, high in edges_S2)
    return Heat(edges_S2.mean(axis=1), columns, blocks_LS)


def layer_series(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [S] and values [S, L] of a figure by layer, from the run's arrays or from its metrics; None without."""
    if metric in run.layers:
        return run.layers[metric]
    names = [name for name in run.names if re.fullmatch(rf"{re.escape(metric)}/layer_\d+", name)]
    if not names:
        return None
    steps = np.unique(np.concatenate([run.steps(name) for name in names]))
    values = np.full((len(steps), len(names)), np.nan)
    for layer, name in enumerate(names):
        values[np.searchsorted(steps, run.steps(name)), layer] = run.values(name)
    return steps, values


def expert_load(arm: Arm) -> np.ndarray | None:
    """Tokens of each expert over the mean of its layer's experts, whole run, mean over seeds: [L, E]."""
    loads = []
    for cell in arm.cells:
        if "routing/load/tokens" in cell.run.layers:
            tokens_LE = mean_of_finite(cell.run.layers["routing/load/tokens"][1])
            loads.append(tokens_LE / tokens_LE.mean(axis=1, keepdims=True))
    shapes = {load.shape for load in loads}
    return mean_of_finite(np.stack(loads)) if len(shapes) == 1 else None


def bank_curve(arms: Sequence[Arm], metric: str, *, final: bool) -> tuple[Curve, ...]:
    """`metric` of bank arms against their number of mini-batches, a curve for each arm of the study's file."""
    curves = []
    for name in dict.fromkeys(arm.of for arm in arms):
        own = sorted((arm for arm in arms if arm.of == name), key=lambda arm: arm.mini_batches or 0)
        seeds = sorted({cell.seed for arm in own for cell in arm.cells})
        values = np.full((len(seeds), len(own)), np.nan)
        for column, arm in enumerate(own):
            for cell in arm.cells:
                value = cell.run.final(metric) if final else cell.run.mean(metric)
                values[seeds.index(cell.seed), column] = value
        over = band(values)
        if np.isfinite(over.mean).any():
            counts = np.array([float(arm.mini_batches or 0) for arm in own])
            zeros = counts[over.mean == 0]
            curves.append(Curve(name, counts, over.mean, over.low, over.high, over.seeds, zeros=zeros))
    return tuple(curves)


def dot(arm: str, values: Sequence[float]) -> Dot | None:
    """One value a seed as a row; None where none is finite."""
    finite = tuple(value for value in values if np.isfinite(value))
    if not finite:
        return None
    over_seeds = estimate(finite)
    return Dot(arm, arm, over_seeds.mean, over_seeds.low, over_seeds.high, finite)


def each_arm(arms: Sequence[Arm], make: Callable[[Arm], Curve | None]) -> tuple[Curve, ...]:
    """What `make` draws of each arm, without those it has nothing for."""
    return tuple(curve for arm in arms if (curve := make(arm)) is not None)


def lacking(arms: Sequence[Arm], metric: str) -> list[str]:
    """In words, the arms where not every seed has the metric."""
    missing = []
    for arm in arms:
        without = sum(metric not in cell.run.names for cell in arm.cells)
        if without:
            missing.append(
                arm.name if without == len(arm.cells) else f"{arm.name} ({without} of {len(arm.cells)} seeds)"
            )
    return [f"{metric} not measured in: {', '.join(missing)}"] if missing else []


def mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is finite, NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of the empty mean that is meant here
        return np.asarray(np.nanmean(np.where(np.isfinite(values), values, np.nan), axis=0))
