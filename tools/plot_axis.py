"""A study along an axis, as a picture and a table: `python tools/plot_axis.py STUDY --x TITLE [--metrics NAME ...]`.

Arms whose names end in a number, as gspo_16 or grpo_3e-4, are points of one curve, or, with --mini-batches, those of
one name on banks of several N. Drawn is the mean over seeds with its interval from the study's summary.json.
`collapsed` stands for the share of seeds whose run collapsed, `collapse_step` for the step that it did at, a run's last
one where it did not; the table has these by seed. A curve "A - B" is the mean of differences at the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gspo_moe.cli import USER_ERROR
from gspo_moe.errors import DataError
from gspo_moe.observability.comparison import estimate
from gspo_moe.report.palette import COLORS

COLLAPSED = "collapsed"
COLLAPSE_STEP = "collapse_step"
TITLES = {
    "routing/attribution/design_effect": "design effect: 1 for independent routing noise",
    "routing/attribution/phi_token": "φ of tokens: variance share of routes",
    "routing/attribution/phi_sequence": "φ of sequences",
    "routing/staleness/slot_change": "share of expert slots changed",
    "ratio/token_std": "std of the token ratio",
    "ratio/sequence_std": "std of the sequence ratio",
    "routing/attribution/washout": "W: the design effect where answers are equally long",
    "response/length_mean": "tokens an answer",
    "kl/old_k3": "k3 of old and new policy, nats a token",
    "reward/mean": "reward",
    "eval/accuracy": "held-out accuracy",
    "clip_fraction/token": "share of tokens clipped",
    COLLAPSED: "share of seeds whose run collapsed",
    COLLAPSE_STEP: "step of the collapse, or more",
}
DEFAULT = tuple(TITLES)[:6]


@dataclass(frozen=True)
class Point:
    """One arm at its place: the mean over seeds, and its interval, None for fewer than two of them.

    by_seed: what they are of. shown: what the table says of it, where not these.
    """

    x: float
    mean: float
    interval: tuple[float, float] | None
    seeds: int
    by_seed: Mapping[str, float] = field(default_factory=dict)
    shown: str | None = None

    def __str__(self) -> str:
        if self.shown is not None:
            return self.shown
        interval = "" if self.interval is None else " [{:.3g}, {:.3g}]".format(*self.interval)
        return f"{self.mean:.3g}{interval}"


Curves = dict[str, list[Point]]
Place = Callable[[Mapping[str, Any]], tuple[str, float] | None]  # an arm's curve, and where it is on it


def by_name(arm: Mapping[str, Any]) -> tuple[str, float] | None:
    """Curve and place of an arm whose name ends in _NUMBER."""
    series, _, number = arm["of"].rpartition("_")
    try:
        x = float(number)
    except ValueError:
        return None
    return series if arm["mini_batches"] is None else f"{series}, N = {arm['mini_batches']}", x


def by_mini_batches(arm: Mapping[str, Any]) -> tuple[str, float] | None:
    return None if arm["mini_batches"] is None else (arm["of"], float(arm["mini_batches"]))


def curves(summary: Mapping[str, Any], metric: str, kind: str = "mean", place: Place = by_name) -> Curves:
    """kind: which mean of the metric, as the summary's definitions have them. place: whose axis it is.

    Raises DataError where no arm has a place on the axis, or none that does has the metric.
    """
    found: Curves = {}
    for arm in summary["arms"].values():
        at = place(arm)
        point = None if at is None else _point(at[1], arm, metric, kind)
        if at is not None and point is not None:
            found.setdefault(at[0], []).append(point)
    if not found:
        raise DataError(f"no arm of the study {summary['study']} is on the axis and has {metric}; name another metric")
    return {series: sorted(points, key=lambda point: point.x) for series, points in found.items()}


def _point(x: float, arm: Mapping[str, Any], metric: str, kind: str) -> Point | None:
    if metric == COLLAPSED:
        steps = list(arm["collapsed"].values())
        return Point(x, sum(step is not None for step in steps) / len(steps), None, len(steps)) if steps else None
    if metric == COLLAPSE_STEP:
        if "steps" not in arm:
            raise DataError("summary.json is of a version that wrote no lengths of runs; run the study's command again")
        reached = {seed: arm["steps"][seed] if step is None else step for seed, step in arm["collapsed"].items()}
        shown = ", ".join("none" if step is None else str(step) for step in arm["collapsed"].values())
        return _estimated(x, reached, shown)
    figure = arm["metrics"].get(metric, {}).get(kind)
    if figure is None or figure["mean"] is None:
        return None
    interval = None if figure["low"] is None else (figure["low"], figure["high"])
    return Point(x, figure["mean"], interval, figure["seeds"], figure.get("by_seed", {}))


def _estimated(x: float, by_seed: Mapping[str, float], shown: str | None = None) -> Point | None:
    found = estimate(list(by_seed.values()))
    interval = (found.low, found.high) if found.seeds > 1 else None
    return Point(x, found.mean, interval, found.seeds, by_seed, shown) if by_seed else None


def draw(panels: Mapping[str, Curves], x_title: str, target: Path) -> None:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({"font.size": 10, "axes.titlelocation": "left", "legend.frameon": False}):
        figure = Figure(figsize=(4.4 * columns, 3.3 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (metric, found) in zip(axes, panels.items(), strict=False):
            _panel(axis, metric, found)
            axis.set(title=TITLES.get(metric, metric), xlabel=x_title)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[0].legend(fontsize=8)
        figure.savefig(target, dpi=110)


def _panel(axis: Axes, metric: str, found: Curves) -> None:
    for number, (series, points) in enumerate(found.items()):
        color, shift = COLORS[number % len(COLORS)][0], 1 + 0.012 * (number - (len(found) - 1) / 2)
        intervals = [point.interval or (point.mean, point.mean) for point in points]
        below = [point.mean - low for point, (low, _) in zip(points, intervals, strict=True)]
        above = [high - point.mean for point, (_, high) in zip(points, intervals, strict=True)]
        places, means = [shift * point.x for point in points], [point.mean for point in points]
        axis.errorbar(places, means, (below, above), fmt="o-", color=color, ms=4, lw=1.2, capsize=2, label=series)
    ticks = sorted({point.x for points in found.values() for point in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    if metric.endswith(("/design_effect", "/washout")):
        axis.axhline(1, color="#888888", lw=0.8)
    if all(low >= 0 for points in found.values() for point in points for low in (point.interval or (point.mean,))):
        axis.set_ylim(bottom=0)
    else:
        axis.axhline(0, color="#888888", lw=0.8)


def table(panels: Mapping[str, Curves]) -> str:
    """Markdown: a row for each metric and curve, a column for each place."""
    ticks = sorted({point.x for found in panels.values() for points in found.values() for point in points})
    lines = [f"| | | {' | '.join(f'{tick:g}' for tick in ticks)} |", "|---" * (len(ticks) + 2) + "|"]
    for metric, found in panels.items():
        for series, points in found.items():
            at = {point.x: str(point) for point in points}
            lines.append(f"| {metric} | {series} | {' | '.join(at.get(tick, '') for tick in ticks)} |")
    return "\n".join(lines)


def chosen(found: Curves, names: Sequence[str]) -> Curves:
    """Those of the names, of which "A - B" stands for paired differences.

    Raises DataError for one that is not there.
    """
    parts = {name: name.split(" - ") for name in names}
    missing = {part for each in parts.values() for part in each} - found.keys()
    if missing:
        raise DataError(f"there is no curve {', '.join(sorted(missing))}; there are {', '.join(found)}")
    return {
        name: found[each[0]] if len(each) == 1 else _paired(*(found[one] for one in each))
        for name, each in parts.items()
    }


def _paired(of: Sequence[Point], base: Sequence[Point]) -> list[Point]:
    pairs = [(one, other) for one in of for other in base if one.x == other.x]
    found = [
        _estimated(
            one.x, {seed: one.by_seed[seed] - other.by_seed[seed] for seed in one.by_seed if seed in other.by_seed}
        )
        for one, other in pairs
    ]
    return [point for point in found if point is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a study's arms along the number their names end in.")
    parser.add_argument("study", type=Path, help="the study's folder, with summary.json")
    parser.add_argument("--x", required=True, help="what the numbers are")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT)
    parser.add_argument(
        "--of", choices=("mean", "final", "before_collapse"), default="mean", help="mean over which steps"
    )
    parser.add_argument("--mini-batches", action="store_true", help="the axis is N of the study's banks")
    parser.add_argument("--curves", nargs="+", help='default: all; "A - B": paired differences')
    parser.add_argument("--output", type=Path, help="default: axis.png in the study's folder")
    options = parser.parse_args()
    try:
        try:
            summary = json.loads((options.study / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{options.study}/summary.json cannot be read ({error}); name a study's folder") from error
        place = by_mini_batches if options.mini_batches else by_name
        panels = {metric: curves(summary, metric, options.of, place) for metric in options.metrics}
        panels = {metric: chosen(found, options.curves or list(found)) for metric, found in panels.items()}
    except DataError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    target = options.output or options.study / "axis.png"
    draw(panels, options.x, target)
    print(table(panels))
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
