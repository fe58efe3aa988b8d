"""From an arm's runs to curves, heat maps and single values, with their intervals over seeds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from gspo_moe.observability.catalog import CATALOG
from gspo_moe.observability.comparison import band, estimate
from gspo_moe.report.collect import Arm, Cell
from gspo_moe.report.curves import moving_mean
from gspo_moe.report.figures import Curve, Dot

POINTS_DRAWN = 400
COLUMNS_DRAWN = 120
FINAL_SHARE = 0.1


def unit_of(metric: str) -> str:
    """The catalog's unit; empty for a metric that the catalog does not have."""
    return CATALOG[metric].unit if metric in CATALOG else ""


def step_curve(arm: Arm, metric: str, *, smooth: bool, log: bool = False) -> Curve | None:
    """The arm's `metric` over steps; None where no seed has a finite value of it. log: leaves out values <= 0."""
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
    if log:
        raw[raw <= 0], smoothed[smoothed <= 0] = np.nan, np.nan
    if not np.isfinite(smoothed).any():
        return None
    seeds = band(smoothed)
    thinned = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS_DRAWN)).round().astype(int))
    return Curve(
        arm.name,
        steps[thinned].astype(np.float64),
        seeds.mean[thinned],
        seeds.low[thinned],
        seeds.high[thinned],
        seeds.seeds[thinned],
        _mean(raw)[thinned] if smooth else None,
    )


def count_curve(arm: Arm, pattern: re.Pattern[str]) -> Curve | None:
    """Means over the run of the metrics that `pattern` matches whole, against the number in its first group."""
    numbered = sorted((int(match[1]), name) for name in arm.names if (match := pattern.fullmatch(name)))
    if not numbered:
        return None
    values = np.array([[run_mean(cell, name) for _, name in numbered] for cell in arm.cells])
    if not np.isfinite(values).any():
        return None
    seeds = band(values)
    return Curve(arm.name, np.array([float(n) for n, _ in numbered]), seeds.mean, seeds.low, seeds.high, seeds.seeds)


def heat(arm: Arm, pattern: re.Pattern[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray] | None:
    """Steps [S], layers and values_LS (mean over seeds) of the metrics that `pattern` matches; None without any.

    Long runs are averaged in blocks of steps, each named by its first step.
    """
    layers = sorted((int(match[1]), name) for name in arm.names if (match := pattern.fullmatch(name)))
    cells = [cell for cell in arm.cells if any(name in cell.run.names for _, name in layers)]
    if not cells:
        return None
    names = [name for _, name in layers]
    steps = np.unique(np.concatenate([cell.run.steps(n) for cell in cells for n in names if n in cell.run.names]))
    values = np.full((len(cells), len(names), len(steps)), np.nan)
    for row, cell in enumerate(cells):
        for column, name in enumerate(names):
            if name in cell.run.names:
                values[row, column, np.searchsorted(steps, cell.run.steps(name))] = cell.run.values(name)
    block = -(-len(steps) // COLUMNS_DRAWN)
    starts = np.arange(0, len(steps), block)
    mean_LS = _mean(values)
    blocks_LS = np.stack([_mean(mean_LS[:, start : start + block].T) for start in starts], axis=1)
    return steps[starts], tuple(str(number) for number, _ in layers), blocks_LS


def run_mean(cell: Cell, metric: str) -> float:
    """Mean of the metric's finite values over the whole run; NaN without any."""
    if metric not in cell.run.names:
        return float("nan")
    values = cell.run.values(metric)
    return float(_mean(values[:, None])[0])


def final_value(cell: Cell, metric: str) -> float:
    """Mean over the last tenth of the points at which the metric was measured; NaN where it was not."""
    if metric not in cell.run.names:
        return float("nan")
    values = cell.run.values(metric)
    tail = values[-max(1, round(len(values) * FINAL_SHARE)) :]
    return float(_mean(tail[:, None])[0])


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


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is finite, NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of the empty mean that is meant here
        return np.asarray(np.nanmean(np.where(np.isfinite(values), values, np.nan), axis=0))
