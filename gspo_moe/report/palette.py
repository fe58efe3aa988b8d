"""How arms look: colour-blind safe colours, Okabe and Ito's but for one, and a line style each beside the colour."""

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


# Okabe-Ito's yellow, which white swallows, is Tol's wine here; their black turns grey on a dark ground.
COLORS = (
    ("#0072B2", "#4BA3DE"),
    ("#D55E00", "#F0803C"),
    ("#009E73", "#2FC79A"),
    ("#CC79A7", "#DD93BC"),
    ("#B37A00", "#E69F00"),
    ("#3A95CC", "#8CCBF0"),
    ("#333333", "#D0D0D0"),
    ("#882255", "#C2608F"),
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
    """One look an arm; colour, line and marker go round in different periods, so 120 arms stay apart."""
    return {
        arm: Look(
            *COLORS[number % len(COLORS)],
            *LINES[number % len(LINES)],
            MARKERS[number % len(MARKERS)],
        )
        for number, arm in enumerate(arms)
    }
