"""Figures of what the router does: expert slots changed, by pair of policies, layer and step, and expert load."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gspo_moe.report.collect import Arm
from gspo_moe.report.figures import Curve, Figure, HeatPanel, LinePanel
from gspo_moe.report.series import count_curve, each_arm, expert_load, heat, lacking, mean_of_finite, step_curve

PAIRS = {
    "staleness": "policy in training against the policy that sampled",
    "update": "before against after one update, on fixed probes",
    "engine": "rollout engine against trainer, at equal weights",
}
MARGIN_AXIS = "margin bin: 0 below 1e-4 ... 4 above 0.1"


def volatility_figure(arms: Sequence[Arm], absent: list[str]) -> Figure | None:
    """Expert slots changed, a panel for each pair of policies that was compared, with its noise floor."""
    panels, notes, drawn = [], [], []
    for pair, meaning in PAIRS.items():
        metric = f"routing/{pair}/slot_change"
        curves = each_arm(arms, partial(step_curve, metric=metric, smooth=True))
        if not curves:
            absent.append(f"Expert slots changed, {pair} ({meaning}): {metric}")
            continue
        floors = each_arm(arms, partial(_floor_curve, pair=pair))
        drawn.append(pair)
        panels.append(LinePanel(pair.capitalize(), "fraction", curves, floors))
        notes += lacking(arms, metric) + _floor_notes(arms, pair)
    counts = each_arm(arms, partial(count_curve, pattern=re.compile(r"routing/staleness/slot_change/mini_batch_(\d+)")))
    if counts:
        panels.append(
            LinePanel("Staleness by mini-batch", "fraction", counts, x_label="mini-batch of the step", markers=True)
        )
    margins = each_arm(
        arms, partial(count_curve, pattern=re.compile(r"routing/staleness/flip_rate_by_margin/bin_(\d+)"))
    )
    if margins:
        panels.append(LinePanel("Flip rate by router margin", "fraction", margins, x_label=MARGIN_AXIS, markers=True))
    if not panels:
        return None
    return Figure(
        "volatility",
        "Volatility: expert slots changed",
        "Share of a token's top-k expert slots that differ between two policies, over all layers. "
        + ". ".join(f"{pair.capitalize()}: {PAIRS[pair]}" for pair in drawn)
        + ". Dotted: the noise floor of the same comparison.",
        tuple(panels),
        tuple(notes),
    )


def _floor_curve(arm: Arm, pair: str) -> Curve | None:
    return step_curve(arm, floor_metric(arm, pair), smooth=True)


def floor_metric(arm: Arm, pair: str) -> str:
    """The noise floor of `pair`; staleness may read it off the first mini-batch, whose weights are the old policy's."""
    name = f"routing/{pair}/noise_floor/slot_change"
    if pair == "staleness" and name not in arm.names:
        return "routing/staleness/slot_change/mini_batch_1"
    return name


def _floor_notes(arms: Sequence[Arm], pair: str) -> list[str]:
    measured = [arm.name for arm in arms if f"routing/{pair}/noise_floor/slot_change" in arm.names]
    others = [arm for arm in arms if f"routing/{pair}/slot_change" in arm.names and arm.name not in measured]
    stand_in = [arm.name for arm in others if floor_metric(arm, pair) in arm.names]
    none = [arm.name for arm in others if arm.name not in stand_in]
    notes = []
    if stand_in:
        notes.append(f"{pair}, {', '.join(stand_in)}: the floor drawn is mini-batch 1, at the old policy's weights")
    if none:
        notes.append(f"{pair}, {', '.join(none)}: the noise floor was not measured")
    return notes


def volatility_maps(arms: Sequence[Arm], pair: str, absent: list[str]) -> Figure | None:
    """Expert slots changed by layer and step, a map for each arm."""
    figure = _heat_figure(
        arms,
        f"routing/{pair}/slot_change",
        f"volatility_layers_{pair}",
        f"Volatility by layer and step, {pair}",
        f"Expert slots changed, {PAIRS[pair]}; mean over seeds. One colour scale for all panels; the narrow column on "
        "the left, where it was measured, is the noise floor in the same colours.",
        floor=lambda arm, depth: _floor_by_layer(arm, pair, depth),
    )
    if figure is None and pair == "staleness":
        absent.append(f"Volatility by layer and step: routing/{pair}/slot_change/layer_*")
    return figure


def load_maps(arms: Sequence[Arm]) -> Figure | None:
    """The busiest expert by layer and step, a map for each arm."""
    return _heat_figure(
        arms,
        "routing/load/max_violation",
        "load_layers",
        "Expert load by layer and step",
        "How far the busiest expert's tokens exceed the mean; mean over seeds, one colour scale for all panels.",
        floor=lambda arm, depth: None,
    )


def expert_maps(arms: Sequence[Arm]) -> Figure | None:
    """Each expert's tokens by layer, a map for each arm."""
    loads = {arm.name: load for arm in arms if (load := expert_load(arm)) is not None}
    if not loads:
        return None
    top = max(float(load.max()) for load in loads.values())
    panels = tuple(
        HeatPanel(
            name, name, "of the layer's mean", np.arange(load.shape[1]), tuple(map(str, range(len(load)))), load, None,
            top, "expert",
        )
        for name, load in loads.items()
    )  # fmt: skip
    return Figure(
        "load_experts",
        "Expert load by layer and expert",
        "An expert's tokens over the mean of its layer's experts, over the whole run; 1 is an equal share. Mean over "
        "seeds, one colour scale for all panels.",
        panels,
    )


def _heat_figure(
    arms: Sequence[Arm],
    metric: str,
    key: str,
    title: str,
    caption: str,
    floor: Callable[[Arm, int], np.ndarray | None],
) -> Figure | None:
    maps = [(arm, drawn) for arm in arms if (drawn := heat(arm, metric)) is not None]
    finite = [values[np.isfinite(values)] for _, (_, _, values) in maps]
    finite = [values for values in finite if len(values)]
    if not finite:
        return None
    # A single outlying step would leave the rest of the map in one colour.
    top = max(float(np.quantile(np.concatenate(finite), 0.995)), 1e-12)
    panels = tuple(
        HeatPanel(arm.name, arm.name, "fraction", steps, layers, values, floor(arm, len(layers)), top)
        for arm, (steps, layers, values) in maps
    )
    without = [arm.name for arm in arms if arm.name not in {panel.arm for panel in panels}]
    notes = (f"not measured by layer in: {', '.join(without)}",) if without else ()
    return Figure(key, title, caption, panels, notes)


def _floor_by_layer(arm: Arm, pair: str, depth: int) -> np.ndarray | None:
    """Mean over the run and seeds of each layer's floor, else of the floor of all layers together, [L]."""
    found = heat(arm, f"routing/{pair}/noise_floor/slot_change")
    if found is not None and len(found[1]) == depth:
        return mean_of_finite(found[2].T)
    floor = mean_of_finite(np.array([cell.run.mean(floor_metric(arm, pair)) for cell in arm.cells]))
    return np.full(depth, floor) if np.isfinite(floor) else None
