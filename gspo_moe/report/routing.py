"""Figures of what the router does: expert slots changed, by pair of policies, layer and step, and expert load."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gspo_moe.report.collect import Arm
from gspo_moe.report.figures import Curve, Figure, HeatPanel, LinePanel
from gspo_moe.report.series import (
    Heat,
    are_zero,
    count_curve,
    each_arm,
    expert_load,
    heat,
    lacking,
    mean_of_finite,
    step_curve,
)

PAIRS = {
    "staleness": "policy in training against the policy that sampled",
    "update": "before against after one update, on fixed probes",
    "engine": "rollout engine against trainer, at equal weights",
}
MARGIN_AXIS = "router margin, probability"
MARGIN_TICKS = ("< 1e-4", "1e-4 to 1e-3", "1e-3 to 0.01", "0.01 to 0.1", "≥ 0.1")


def volatility_figure(arms: Sequence[Arm], absent: list[str]) -> Figure | None:
    """Expert slots changed, a panel for each pair of policies that was compared, with its noise floor."""
    panels, notes, remarks, drawn = [], [], [], []
    for pair, meaning in PAIRS.items():
        metric = f"routing/{pair}/slot_change"
        curves = each_arm(arms, partial(step_curve, metric=metric, smooth=True))
        if not curves:
            absent.append(f"Expert slots changed, {pair} ({meaning}): {metric}")
            continue
        notes += lacking(arms, metric)
        floors = each_arm(arms, partial(_floor_curve, pair=pair))
        drawn.append(pair)
        if are_zero((*curves, *floors)):
            remarks.append(f"{pair.capitalize()}: 0 at every step{', and so is its noise floor' if floors else ''}.")
            continue
        panels.append(LinePanel(pair.capitalize(), "fraction", curves, floors))
        notes += _floor_notes(arms, pair)
    counts = each_arm(arms, partial(count_curve, pattern=re.compile(r"routing/staleness/slot_change/mini_batch_(\d+)")))
    if counts:
        panels.append(
            LinePanel("Staleness by mini-batch", "fraction", counts, x_label="mini-batch of the step", markers=True)
        )
    margins = each_arm(
        arms, partial(count_curve, pattern=re.compile(r"routing/staleness/flip_rate_by_margin/bin_(\d+)"))
    )
    if margins:
        panels.append(
            LinePanel(
                "Flip rate by router margin", "fraction", margins, x_label=MARGIN_AXIS, markers=True, ticks=MARGIN_TICKS
            )
        )
    if not (panels or remarks):
        return None
    return Figure(
        "volatility",
        "Volatility: expert slots changed",
        "Share of a token's top-k expert slots that differ between two policies, over all layers. "
        + ". ".join(f"{pair.capitalize()}: {PAIRS[pair]}" for pair in drawn)
        + ". Dotted: the noise floor of the same comparison.",
        tuple(panels),
        tuple(notes),
        tuple(remarks),
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
    panels = []
    for name, load in loads.items():
        experts = np.arange(load.shape[1], dtype=np.float64)
        columns, layers = (tuple(map(str, range(count))) for count in load.shape[::-1])
        panels.append(HeatPanel(name, name, "of the layer's mean", experts, columns, layers, load, None, top, "expert"))
    return Figure(
        "load_experts",
        "Expert load by layer and expert",
        "An expert's tokens over the mean of its layer's experts, over the whole run; 1 is an equal share. Mean over "
        "seeds, one colour scale for all panels.",
        tuple(panels),
    )


def _heat_figure(
    arms: Sequence[Arm],
    metric: str,
    key: str,
    title: str,
    caption: str,
    floor: Callable[[Arm, int], np.ndarray | None],
) -> Figure | None:
    maps = [(arm, drawn, floor(arm, len(drawn.layers))) for arm in arms if (drawn := heat(arm, metric)) is not None]
    maps = [entry for entry in maps if np.isfinite(entry[1].values_LS).any()]
    if not maps:
        return None
    flat = [
        _zero_words(arm, drawn, floor_L) for arm, drawn, floor_L in maps if not np.nan_to_num(drawn.values_LS).any()
    ]
    shown = [entry for entry in maps if np.nan_to_num(entry[1].values_LS).any()]
    # A single outlying step would leave the rest of the map in one colour.
    values = [drawn.values_LS[np.isfinite(drawn.values_LS)] for _, drawn, _ in shown]
    top = max(float(np.quantile(np.concatenate(values), 0.995)), 1e-12) if values else 0.0
    panels = tuple(
        HeatPanel(arm.name, arm.name, "fraction", drawn.steps, drawn.columns, drawn.layers, drawn.values_LS, own, top)
        for arm, drawn, own in shown
    )
    without = [arm.name for arm in arms if arm.name not in {arm.name for arm, _, _ in maps}]
    notes = (f"not measured by layer in: {', '.join(without)}",) if without else ()
    return Figure(key, title, caption if panels else "", panels, notes, tuple(flat))


def _zero_words(arm: Arm, drawn: Heat, floor_L: np.ndarray | None) -> str:
    """Of a map that would be one colour."""
    floor = "" if floor_L is None else f"; the noise floor is {floor_L.mean():.3g}"
    return f"{arm.name}: 0 in every layer at every step that was measured{floor}."


def _floor_by_layer(arm: Arm, pair: str, depth: int) -> np.ndarray | None:
    """Mean over the run and seeds of each layer's floor, else of the floor of all layers together, [L]."""
    found = heat(arm, f"routing/{pair}/noise_floor/slot_change")
    if found is not None and len(found.layers) == depth:
        return mean_of_finite(found.values_LS.T)
    floor = mean_of_finite(np.array([cell.run.mean(floor_metric(arm, pair)) for cell in arm.cells]))
    return np.full(depth, floor) if np.isfinite(floor) else None
