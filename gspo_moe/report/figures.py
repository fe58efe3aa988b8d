"""The kinds of panel a report draws, as data: the page and the matplotlib figures show the same numbers.

Shape letters: P points along a curve, L layers, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Curve:
    """One arm's mean over seeds and its pointwise interval.

    x, mean, low, high: float64 [P]; low and high are NaN where fewer than two seeds have a value.
    seeds: int64 [P]. raw: the mean over seeds before the moving mean, None where nothing was smoothed.
    zeros: float64 [Z], where the mean over seeds before any moving mean is 0, which a log axis has no place for.
    """

    arm: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: np.ndarray
    raw: np.ndarray | None = None
    zeros: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class LinePanel:
    """Curves over steps (or over another count, `x_label`).

    floors: noise floors, drawn dotted in the arm's colour. doublings: the few places of x double, and lie evenly apart.
    log: a log axis, at whose foot the curves' zeros are marked. ticks: names of the places 0, 1, ... of x, if any.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    floors: tuple[Curve, ...] = ()
    x_label: str = "step"
    log: bool = False
    markers: bool = False
    doublings: bool = False
    ticks: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatPanel:
    """One arm's values by layer and step (or expert, `x_label`), mean over seeds.

    x: what S counts, float64 [S]. columns: what each of S is called, a block of several by its edges.
    values_LS: float64, NaN where not measured. floor_L: the noise floor by layer, None without one.
    top: the largest value of the colour scale, common to all panels of a figure.
    """

    arm: str
    title: str
    unit: str
    x: np.ndarray
    columns: tuple[str, ...]
    layers: tuple[str, ...]
    values_LS: np.ndarray
    floor_L: np.ndarray | None
    top: float
    x_label: str = "step"


@dataclass(frozen=True)
class Dot:
    """One row of a DotPanel: a mean with its interval over seeds, and the value of each seed."""

    arm: str
    label: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class DotPanel:
    """Means with intervals, a row each. reference: where a line marks a value with a meaning of its own."""

    title: str
    unit: str
    dots: tuple[Dot, ...]
    reference: float | None = None


Panel = LinePanel | HeatPanel | DotPanel


@dataclass(frozen=True)
class Figure:
    """Panels of one question.

    key: file name and anchor. notes: what is missing, in words. remarks: what needs no panel, such as zero everywhere.
    shared_y: all panels have the same y axis.
    """

    key: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    shared_y: bool = False
