"""What a run tells about its router, as a picture and a few figures: `python tools/plot_routing.py RUN [--output PNG]`.

Volatility by layer and step, by mini-batch with its noise floor, phi and W with their intervals, and the means over the
run that docs/routing.md quotes. The run needs routing.record; its probe and attribution are drawn where it has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gspo_moe.cli import USER_ERROR
from gspo_moe.errors import DataError
from gspo_moe.observability import Run, load_run

STALENESS, ATTRIBUTION = "routing/staleness/slot_change", "routing/attribution"
# Okabe and Ito's palette, safe for colour-blind readers.
COLORS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a run's routing figures and prints their means.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, help="default: routing.png in the run's folder")
    options = parser.parse_args()
    try:
        run = load_run(options.run)
        if STALENESS not in run.layers:
            raise DataError(f"{options.run} has no figures by layer; was it run with routing.record=false?")
    except DataError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    target = options.output or options.run / "routing.png"
    with matplotlib.rc_context({"font.size": 10, "axes.titlelocation": "left", "legend.frameon": False}):
        draw(run, target)
    print(means(run))
    print(target)
    return 0


def draw(run: Run, target: Path) -> None:
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _heat_map(run, axes[0, 0])
    _mini_batches(run, axes[0, 1])
    for axis, names, title in (
        (axes[1, 0], ("phi_token", "phi_sequence"), "φ: share of the log-ratio's variance from changed routes"),
        (axes[1, 1], ("washout",), "W: 1 where the mean washes routing noise out"),
    ):
        _intervals(run, axis, names, title)
    figure.savefig(target, dpi=110)


def _heat_map(run: Run, axis: Axes) -> None:
    steps, values = run.layers[STALENESS]
    grid = axis.pcolormesh(steps, np.arange(values.shape[1]), 100 * values.T, cmap="viridis", shading="nearest")
    axis.set(title="slot change, % (staleness)", xlabel="step", ylabel="MoE layer", yticks=np.arange(values.shape[1]))
    axis.figure.colorbar(grid, ax=axis)


def _mini_batches(run: Run, axis: Axes) -> None:
    names = [name for name in run.names if name.startswith(f"{STALENESS}/mini_batch_")]
    for name, color in zip(names, COLORS * len(names), strict=False):
        number = name.rpartition("_")[2]
        floor = ", the noise floor" if number == "1" else ""
        axis.plot(run.steps(name), 100 * run.values(name), color=color, lw=1.2, label=f"mini-batch {number}{floor}")
    if "routing/update/slot_change" in run.series:
        value, low, high = (100 * run.values(f"routing/update/slot_change{end}") for end in ("", "_low", "_high"))
        steps = run.steps("routing/update/slot_change")
        axis.errorbar(steps, value, (value - low, high - value), fmt="k.", lw=0.8, label="one update, probe set, 95 %")
    axis.set(title="slot change, %", xlabel="step")
    axis.set_ylim(top=1.5 * axis.get_ylim()[1])
    axis.legend(fontsize=8, ncols=2, loc="upper center")


def _intervals(run: Run, axis: Axes, names: tuple[str, ...], title: str) -> None:
    for offset, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        if f"{ATTRIBUTION}/{name}" not in run.series:
            axis.text(0.5, 0.5, "not measured in this run", ha="center", transform=axis.transAxes)
            continue
        value, low, high = (run.values(f"{ATTRIBUTION}/{name}{end}") for end in ("", "_low", "_high"))
        bars = (np.maximum(value - low, 0), np.maximum(high - value, 0))
        steps = run.steps(f"{ATTRIBUTION}/{name}") + 0.8 * offset
        axis.errorbar(steps, value, bars, fmt="o", color=color, ms=4, lw=1, label=name)
    axis.axhline(1 if names == ("washout",) else 0, color="#888888", lw=0.8)
    axis.set(title=title, xlabel="step")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def means(run: Run) -> str:
    """Means over the run, a line each: over steps, and by layer."""
    lines = []
    names = [f"routing/{pair}/{name}" for pair in ("staleness", "update", "engine") for name in PAIR_FIGURES]
    names += [f"{STALENESS}/mini_batch_{number}" for number in range(1, 9)]
    names += [f"{ATTRIBUTION}/{name}" for name in ("phi_token", "phi_sequence", "washout")]
    for name in (*names, "ratio/token_std", "ratio/sequence_std", "response/length_mean"):
        if name in run.series:
            values = run.values(name)
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            lines.append(f"{name}: {values.mean():.5f} (standard error over {len(values)} steps {error:.5f})")
    for name in (STALENESS, "routing/staleness/router_margin", f"{ATTRIBUTION}/phi_token"):
        if name in run.layers:
            by_layer = np.nanmean(run.layers[name][1], axis=0)
            lines.append(f"{name} by layer: {', '.join(f'{value:.4f}' for value in by_layer)}")
    tokens, flips = (run.layers[f"routing/staleness/margin_{what}"][1].sum(axis=(0, 1)) for what in ("tokens", "flips"))
    lines.append(f"margin bins, share of tokens: {', '.join(f'{share:.3%}' for share in tokens / tokens.sum())}")
    with np.errstate(invalid="ignore"):
        lines.append(f"margin bins, flip rate: {', '.join(f'{rate:.3%}' for rate in flips / tokens)}")
    return "\n".join(lines)


PAIR_FIGURES = (
    "slot_change",
    "noise_floor/slot_change",
    "flip_rate",
    "any_layer_flip",
    "flipped_layers_per_token",
    "response_set_change",
    "router_margin",
    "router_shift",
)


if __name__ == "__main__":
    sys.exit(main())
