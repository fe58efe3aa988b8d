"""curves.png: a run's training curves as small multiples, in Okabe and Ito's colour-blind safe palette."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from gspo_moe.observability import Run, load_run
from gspo_moe.observability.catalog import describe

BLACK, ORANGE, BLUE, GREEN, VERMILION = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00"
GREY = "#595959"
SLOT_CHANGE = "routing/staleness/slot_change"
WINDOWS_A_RUN = 15


@dataclass(frozen=True)
class Curve:
    """One metric in a panel; `points` for those measured now and then, drawn as markers, `ring` as hollow ones."""

    metric: str
    label: str
    color: str
    points: bool = False
    ring: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: tuple[Curve, ...]
    log: bool = False


def draw_curves(run_dir: str | Path) -> Path:
    """Draws the run in `run_dir` and returns the path of its curves.png; raises DataError without metrics.jsonl."""
    run = load_run(run_dir)
    target = run.path / "curves.png"
    with matplotlib.rc_context(
        {
            "font.size": 10.5,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
        }
    ):
        FigureCanvasAgg(curves_figure(run)).print_png(str(target))
    return target


def curves_figure(run: Run) -> Figure:
    """Reward, clipping, routing, ratios, lengths and speed of an RL run; loss and accuracy of a supervised one."""
    panels = _supervised(run) if "sft/loss" in run.names else _reinforcement(run)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(4.2 * columns, 3.0 * rows + 0.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    )
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        _draw(axes, panel, run)
    figure.suptitle(_heading(run), x=0.01, ha="left", fontsize=10.5, color=GREY)
    return figure


def _reinforcement(run: Run) -> tuple[Panel, ...]:
    return (
        Panel(
            "Reward and held-out accuracy",
            (
                Curve("reward/mean", "training reward", BLUE),
                Curve("eval/accuracy", "held-out accuracy", VERMILION, points=True),
                Curve("eval/reward", "held-out reward", BLACK, points=True, ring=True),
            ),
        ),
        Panel(
            "Clipped by the policy loss",
            (
                Curve("clip_fraction/sequence", "sequences", BLUE),
                Curve("clip_fraction/token", "tokens", ORANGE),
            ),
        ),
        Panel("Expert slots changed", _slot_changes(run)),
        Panel(
            "Spread (std) of the policy ratio",
            (
                Curve("ratio/token_std", "token ratio", ORANGE),
                Curve("ratio/sequence_std", "sequence ratio", BLUE),
            ),
            log=True,
        ),
        Panel("Response length", (Curve("response/length_mean", "mean", BLUE),)),
        Panel(
            "Speed",
            (
                Curve("rollout/tokens_per_second", "generation", GREEN),
                Curve("throughput/tokens_per_second", "whole step", BLACK),
            ),
        ),
    )


def _supervised(run: Run) -> tuple[Panel, ...]:
    reward = Curve("eval/reward", "reward, held out", BLACK, points=True, ring=True)
    held_out = [reward] if reward.metric in run.names else []
    return (
        Panel("Supervised loss", (Curve("sft/loss", "training loss", BLUE),)),
        Panel(
            "Accuracy",
            (
                Curve("sft/token_accuracy", "response tokens, training", BLUE),
                Curve("eval/accuracy", "whole answers, held out", VERMILION, points=True),
                *held_out,
            ),
        ),
    )


def _slot_changes(run: Run) -> tuple[Curve, ...]:
    """Overall, and one a mini-batch from light to dark."""
    pattern = re.compile(rf"{SLOT_CHANGE}/mini_batch_(\d+)")
    numbers = sorted(int(match[1]) for match in map(pattern.fullmatch, run.names) if match)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.15, len(numbers)))
    return (
        Curve(SLOT_CHANGE, "all", BLACK),
        *(
            Curve(f"{SLOT_CHANGE}/mini_batch_{number}", f"mini-batch {number}", matplotlib.colors.to_hex(shade))
            for number, shade in zip(numbers, shades, strict=True)
        ),
    )


def _draw(axes: Axes, panel: Panel, run: Run) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(" or ".join(dict.fromkeys(describe(curve.metric).unit for curve in panel.curves)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    present = [c for c in panel.curves if c.metric in run.names and np.isfinite(run.values(c.metric)).any()]
    if not present:
        missing = "\n".join(curve.metric for curve in panel.curves)
        axes.text(0.5, 0.5, f"not measured in this run:\n{missing}", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    for curve in present:
        steps, values = run.steps(curve.metric), run.values(curve.metric)
        if panel.log:
            zeros = steps[values == 0]
            values = np.where(values > 0, values, np.nan)  # a zero would draw a line out of the picture
            foot: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "fillstyle": "none"}
            if len(zeros):
                label = f"{curve.label}: 0"
                axes.plot(zeros, np.zeros(len(zeros)), "v", color=curve.color, label=label, markersize=5, **foot)
        if curve.points:
            shape, fill, size = ("D", "none", 9) if curve.ring else ("o", "full", 6)
            axes.plot(
                steps, values, shape, color=curve.color, label=curve.label, markersize=size, fillstyle=fill, zorder=3
            )
            continue
        axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.35)
        marker = "o" if len(values) == 1 else None
        mean = moving_mean(values)
        axes.plot(steps, mean, color=curve.color, linewidth=1.8, label=curve.label, marker=marker, clip_on=False)
    crowded = len(present) > 3
    if panel.log and any((run.values(curve.metric) > 0).any() for curve in present):
        axes.set_yscale("log")
    elif axes.dataLim.ymin >= 0:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * axes.dataLim.ymax) * (1.35 if crowded else 1.0))
    if len(panel.curves) > 1:
        axes.legend(ncols=2 if crowded else 1, loc="upper left" if crowded else "best")


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the run, over what there is at its ends; NaN is left out."""
    reach = len(values) // WINDOWS_A_RUN // 2
    kernel = np.ones(2 * reach + 1)
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.convolve(np.where(known, values, 0.0), kernel, "same") / np.convolve(known, kernel, "same")


def _heading(run: Run) -> str:
    config = run.config
    parts = [run.path.resolve().name]
    if config:
        what = config["algorithm"]["name"] if config["stage"] == "rl" else "supervised"
        parts += [f"{what} on {config['task']['name']}", f"seed {config['seed']}"]
    return ", ".join(parts) + "   (thin: every step; thick: moving mean)"
