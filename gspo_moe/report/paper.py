"""The report's figures as PNG and SVG files by matplotlib, one of each a figure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from gspo_moe.report.curves import GREY
from gspo_moe.report.figures import DotPanel, Figure, HeatPanel, LinePanel
from gspo_moe.report.palette import Look

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gspo_moe",
}
RAW_SHOWN = 3
ZERO_ROWS, ZERO_ROW = 4, 0.03  # rows of marks, and the share of the axis that each takes
ZERO_LABEL = "0, at the foot of a log axis"
TITLE_WIDTH = 40
NARROW_TITLE_WIDTH = 26  # where the rows' names take a part of the panel


def write_figures(
    folder: Path, figures: Sequence[Figure], looks: Mapping[str, Look], seeds: Mapping[str, str]
) -> list[Path]:
    """Writes `folder`/KEY.png and KEY.svg of every figure and returns their paths.

    seeds: what is said of the number of seeds, by figure key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for figure in figures:
            drawing = draw(figure, looks, seeds[figure.key])
            canvas = FigureCanvasAgg(drawing)
            drawing.draw_without_rendering()
            drawing.set_layout_engine("none")  # settled; it is the slow part, and both files share it
            for suffix in ("png", "svg"):
                target = folder / f"{figure.key}.{suffix}"
                canvas.print_figure(target, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
                written.append(target)
    return written


def draw(figure: Figure, looks: Mapping[str, Look], seeds: str) -> Drawing:
    """One figure: its panels in rows of up to three, the arms' legend below, the number of seeds in the heading."""
    columns = 2 if len(figure.panels) in (2, 4) else min(3, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    drawing = Drawing(
        figsize=(3.6 * columns, 0.7 + rows * max(map(_height, figure.panels))),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06),
    )
    grid = drawing.subplots(rows, columns, squeeze=False, sharey=figure.shared_y)
    for axes, panel in zip(grid.flat, figure.panels, strict=False):
        width = NARROW_TITLE_WIDTH if isinstance(panel, DotPanel) else TITLE_WIDTH
        axes.set_title(textwrap.fill(_text(panel.title), width))
        if isinstance(panel, LinePanel):
            _lines(axes, panel, looks)
        elif isinstance(panel, DotPanel):
            _dots(axes, panel, looks)
        else:
            _heat(drawing, axes, panel)
    for axes in grid.flat[len(figure.panels) :]:
        axes.remove()
    entries: dict[str, Any] = {}
    for axes in drawing.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        names = [_text(label) for label in entries]
        drawing.legend(list(entries.values()), names, loc="outside lower left", ncols=columns * 2)
    drawing.suptitle(f"{figure.title} ({seeds})", x=0.01, ha="left", fontsize=9, color=GREY)
    return drawing


def _height(panel: LinePanel | HeatPanel | DotPanel) -> float:
    if isinstance(panel, LinePanel):
        return 2.5
    if isinstance(panel, DotPanel):
        return 0.8 + 0.28 * len(panel.dots)
    return min(4.0, 1.2 + 0.13 * len(panel.layers))


def _lines(axes: Axes, panel: LinePanel, looks: Mapping[str, Look]) -> None:
    for curve in panel.curves:
        look = looks[curve.arm]
        if curve.raw is not None and len(panel.curves) <= RAW_SHOWN:
            axes.plot(curve.x, _above_zero(curve.raw, panel), color=look.light, linewidth=0.6, alpha=0.3)
        axes.fill_between(curve.x, curve.low, curve.high, color=look.light, alpha=0.16, linewidth=0)
        drawn = np.isfinite(curve.low) & ((curve.mean > 0) | (not panel.log))
        if drawn.sum() == 1:  # where a band has no width
            axes.vlines(curve.x[drawn], curve.low[drawn], curve.high[drawn], color=look.light, linewidth=1.5)
        marker = look.marker[1] if panel.markers or len(curve.x) == 1 else None
        mean = _above_zero(curve.mean, panel)
        lone = np.flatnonzero(_lone(mean))
        if marker is None and len(lone):
            axes.plot(curve.x[lone], mean[lone], look.marker[1], color=look.light, markersize=4)
        known = np.isfinite(mean) if panel.markers else slice(None)
        axes.plot(
            curve.x[known], mean[known], color=look.light, linestyle=look.line, linewidth=1.5, marker=marker,
            markersize=4, label=curve.arm,
        )  # fmt: skip
    for floor in panel.floors:
        axes.plot(floor.x, floor.mean, color=looks[floor.arm].light, linestyle=":", linewidth=1.2)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.unit)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=25, ha="right", rotation_mode="anchor")
    elif panel.doublings:
        _ticks_at(axes, np.unique(np.concatenate([curve.x for curve in panel.curves])))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if panel.log:
        axes.set_yscale("log")
        _mark_zeros(axes, panel, looks)
    elif axes.dataLim.ymin >= 0:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * axes.dataLim.ymax) or 1.0)


def _above_zero(values: np.ndarray, panel: LinePanel) -> np.ndarray:
    """What an axis has a place for: above 0 on a log axis."""
    return np.where(values > 0, values, np.nan) if panel.log else values


def _lone(values: np.ndarray) -> np.ndarray:
    """Finite values between missing ones, which a line does not show."""
    missing = np.concatenate([[True], ~np.isfinite(values), [True]])
    return missing[:-2] & ~missing[1:-1] & missing[2:]


def _mark_zeros(axes: Axes, panel: LinePanel, looks: Mapping[str, Look]) -> None:
    """Marks at the foot of a log axis where a curve is 0."""
    style: dict[str, Any] = {"marker": "v", "linestyle": "none", "markersize": 4, "fillstyle": "none"}
    marked = [curve for curve in panel.curves if len(curve.zeros)]
    for row, curve in enumerate(marked):  # each arm's in a row of its own as far as there is room
        axes.plot(
            curve.zeros, np.full(len(curve.zeros), ZERO_ROW * (row % ZERO_ROWS)), color=looks[curve.arm].light,
            transform=axes.get_xaxis_transform(), clip_on=False, zorder=3, **style,
        )  # fmt: skip
    if marked:
        axes.margins(y=ZERO_ROW * (1 + min(len(marked), ZERO_ROWS)))
        axes.plot([], [], color=GREY, label=ZERO_LABEL, **style)


def _ticks_at(axes: Axes, places: np.ndarray) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xlim(places[0] / 1.2, places[-1] * 1.2)


def _dots(axes: Axes, panel: DotPanel, looks: Mapping[str, Look]) -> None:
    for row, dot in enumerate(panel.dots):
        look = looks[dot.arm]
        axes.plot(dot.values, [row] * len(dot.values), look.marker[1], color=look.light, alpha=0.4, markersize=3)
        if np.isfinite(dot.low):
            axes.plot([dot.low, dot.high], [row, row], color=look.light, linewidth=1.5)
        axes.plot([dot.mean], [row], look.marker[1], color=look.light, markersize=6)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(panel.dots)), [_text(dot.label) for dot in panel.dots])
    axes.set_ylim(len(panel.dots) - 0.5, -0.5)
    axes.set_xlabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(3))  # a panel has room for four labels


def _heat(drawing: Drawing, axes: Axes, panel: HeatPanel) -> None:
    """The map, with the noise floor as a strip on its left in the same colours."""
    rows = np.arange(len(panel.layers))
    scale: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0, "vmax": panel.top, "rasterized": True}
    axes.grid(visible=False)
    mesh = axes.pcolormesh(panel.x, rows, panel.values_LS, **scale)
    outermost = axes
    if panel.floor_L is not None:
        outermost = axes.inset_axes((-0.07, 0.0, 0.05, 1.0))
        edges = np.arange(len(rows) + 1) - 0.5
        outermost.pcolormesh([-0.5, 0.5], edges, panel.floor_L[:, None], **scale)
        outermost.set_xticks([0], ["floor"])
        outermost.grid(visible=False)
        axes.tick_params(labelleft=False, left=False)
    every = -(-len(rows) // 8)
    outermost.set_yticks(rows[::every], panel.layers[::every])
    outermost.set_ylabel("layer")
    axes.set_xlabel(panel.x_label)
    drawing.colorbar(mesh, ax=axes, label=panel.unit)


def _text(label: str) -> str:
    """A label that matplotlib takes for no formula and no private name."""
    return re.sub(r"^_", " _", label.replace("$", r"\$"))
