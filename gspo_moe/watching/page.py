"""`gspo-moe compare` as one page: tables and drawings, no script, nothing from elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2

from gspo_moe.routing.volatility import MARGIN_EDGES
from gspo_moe.watching.command import number

WIDTH, HEIGHT = 640, 200


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    label: str
    value: str


@dataclass(frozen=True)
class Drawing:
    """top: the value that the highest bar has. ticks: what stands below some bars, with its place."""

    title: str
    top: str
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]


def render(
    head: Sequence[str], rows: Sequence[tuple[str, str, str]], figures: dict[str, Any], layers: Sequence[str]
) -> str:
    """The page. head: what was compared. rows: of the table. figures: of `Comparison.to_metrics`."""
    numbers = [str(index) for index in range(len(layers))]
    drawings = [
        bars("Expert slots changed by MoE layer, %", numbers, [100 * one for one in figures["slot_change_by_layer"]]),
        bars("Choices changed by MoE layer, %", numbers, [100 * one for one in figures["flip_rate_by_layer"]]),
    ]
    if "router_margin_by_layer" in figures:
        edges = [f"{edge:g}" for edge in MARGIN_EDGES]
        names = [f"< {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)), f">= {edges[-1]}"]
        drawings += [
            bars("Margin of A's choices by MoE layer", numbers, figures["router_margin_by_layer"]),
            bars("Choices changed by A's margin, %", names, [100 * one for one in figures["flip_rate_by_margin"]]),
        ]
    by_layer = zip(
        layers,
        figures["slot_change_by_layer"],
        figures["flip_rate_by_layer"],
        figures.get("router_margin_by_layer", [math.nan] * len(layers)),
        strict=True,
    )
    source = files("gspo_moe.watching").joinpath("assets", "compare.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(source)
    return template.render(
        head=head, rows=rows, drawings=drawings, by_layer=list(by_layer), width=WIDTH, height=HEIGHT, number=number
    )


def bars(title: str, labels: Sequence[str], values: Sequence[float]) -> Drawing:
    """A bar a value; none where it is NaN."""
    highest = max((value for value in values if math.isfinite(value)), default=0.0)
    step = WIDTH / len(values)
    found = []
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        height = HEIGHT * value / highest if math.isfinite(value) and highest > 0 else 0.0
        found.append(Bar(index * step + 0.1 * step, HEIGHT - height, 0.8 * step, height, label, number(value)))
    every = max(1, math.ceil(len(values) / 16))
    ticks = [((index + 0.5) * step, label) for index, label in enumerate(labels) if index % every == 0]
    return Drawing(title, number(highest), tuple(found), tuple(ticks))
