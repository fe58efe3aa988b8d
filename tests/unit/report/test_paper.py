"""What the matplotlib figures show beside curves and bands."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import LineCollection

from gspo_moe.report.figures import Curve, Figure, LinePanel
from gspo_moe.report.palette import looks
from gspo_moe.report.paper import draw


def test_few_places_lie_evenly_and_a_lone_interval_is_drawn() -> None:
    # At N = 1 the value is 0, which a log axis has no place for, so N = 8 stands alone.
    x, mean, low, high = (np.array(values) for values in ([1.0, 8.0], [0.0, 0.3], [0.0, 0.2], [0.0, 0.5]))
    curve = Curve("gspo", x, mean, low, high, np.array([2, 2]))
    panel = LinePanel("Ratio", "ratio", (curve,), x_label="N", log=True, markers=True, doublings=True)
    axes = draw(Figure("ratios", "Ratios", "", (panel,)), looks(["gspo"]), "2 seeds").axes[0]
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8"]
    (whiskers,) = [each for each in axes.collections if isinstance(each, LineCollection)]
    assert np.array_equal(whiskers.get_segments()[0], [[8.0, 0.2], [8.0, 0.5]])


def test_eight_arms_have_eight_colours() -> None:
    assert len({look.light for look in looks([f"arm{number}" for number in range(8)]).values()}) == 8
