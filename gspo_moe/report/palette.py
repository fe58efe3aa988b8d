"""How arms look: Okabe and Ito's colour-blind safe colours, and a line style each, so that colour is never alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """light, dark: colours for either background. dash: plotly's name; line: matplotlib's. marker: both names."""

    light: str
    dark: str
    dash: str
    line: str | tuple[int, tuple[int, ...]]
    marker: tuple[str, str]


# Okabe-Ito's yellow is left out, which white swallows; its black turns grey on a dark ground.
COLORS = (
    ("#0072B2", "#4BA3DE"),
    ("#D55E00", "#F0803C"),
    ("#009E73", "#2FC79A"),
    ("#CC79A7", "#DD93BC"),
    ("#B37A00", "#E69F00"),
    ("#3A95CC", "#8CCBF0"),
    ("#333333", "#D0D0D0"),
)
LINES: tuple[tuple[str, str | tuple[int, tuple[int, ...]]], ...] = (
    ("solid", "-"),
    ("dash", (0, (6, 3))),
    ("dashdot", (0, (6, 2, 1, 2))),
    ("longdash", (0, (10, 3))),
    ("longdashdot", (0, (10, 2, 1, 2))),
)
MARKERS = (
    ("circle", "o"),
    ("square", "s"),
    ("diamond", "D"),
    ("triangle-up", "^"),
    ("x", "X"),
    ("star", "*"),
)


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """One look an arm; colour, line and marker go round in different periods, so 210 arms stay apart."""
    return {
        arm: Look(
            *COLORS[number % len(COLORS)],
            *LINES[number % len(LINES)],
            MARKERS[number % len(MARKERS)],
        )
        for number, arm in enumerate(arms)
    }
