"""tools/growth.py on powers by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tools.growth import Curve, exponent, fits

SIZES = [1, 2, 4, 8]


def test_the_exponent_is_of_the_upper_points() -> None:
    assert exponent(SIZES, [100.0, 3 * 4.0, 3 * 16.0, 3 * 64.0]) == pytest.approx(2.0)
    assert exponent(SIZES, [7.0, 5.0, 5.0, 5.0]) == pytest.approx(0.0)
    assert exponent([2, 4], [8.0, 4.0]) == pytest.approx(-1.0)
    assert exponent(SIZES, [0.0, 0.0, 0.0, 0.0]) == 0.0


def run(size: int) -> dict[str, Any]:
    """A model of which the rollout needs linearly many operations, training quadratically many."""
    tflop = {
        "rollout": {"experts": 2.0 * size},
        "old_log_probs": {"experts": 1.0},
        "training": {"experts": 1.0 * size**2},
    }
    return {"parameters": 5 * size, "tflop": tflop}


def test_seconds_may_grow_as_the_operations_do() -> None:
    points = [
        {
            "rollout_cpu_seconds": 0.5 * size**1.5,
            "forward_backward_cpu_seconds": 0.5 * size**1.5,
            "update_cpu_seconds": 0.25 * size,
            "memory_gib": 2.0 + 0.01 * size,
        }
        for size in SIZES
    ]
    curve = Curve("things", dict.fromkeys(SIZES, ()))
    found = {fit.figure: fit for fit in fits(curve, SIZES, [run(size) for size in SIZES], points)}
    assert found["rollout_cpu_seconds"].expected == pytest.approx(1.0)
    assert found["rollout_cpu_seconds"].exponent == pytest.approx(1.5)
    assert not found["rollout_cpu_seconds"].holds
    assert found["forward_backward_cpu_seconds"].expected == pytest.approx(2.0)
    assert found["forward_backward_cpu_seconds"].holds
    assert found["update_cpu_seconds"].expected == pytest.approx(1.0)
    assert found["memory_gib"].holds


def test_the_order_counts_where_other_work_dilutes_the_operations() -> None:
    points = [{"old_log_probs_cpu_seconds": 0.5 * size} for size in SIZES]  # of one operation at every size
    (found,) = fits(Curve("layers", {}), SIZES, [run(size) for size in SIZES], points)
    assert (found.expected, found.holds) == (1.0, True)
    (found,) = fits(Curve("experts", {}, order=0.0), SIZES, [run(size) for size in SIZES], points)
    assert (found.expected, found.holds) == (0.0, False)


def test_what_a_process_sends_may_not_grow_with_their_number() -> None:
    curve = Curve("processes", {2: (), 4: ()}, processes=True)
    points = [{"messages": 30.0, "sent_bytes": 1000.0}, {"messages": 30.0, "sent_bytes": 2000.0}]
    messages, sent = fits(curve, [2, 4], [{}, {}], points)
    assert messages.holds
    assert sent.exponent == pytest.approx(1.0)
    assert not sent.holds
