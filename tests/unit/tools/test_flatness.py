"""tools/flatness.py on figures with and without a planted leak."""

from __future__ import annotations

import math
import random

import pytest

from tools.flatness import blocks, table, trend, trends

STEPS = [float(step) for step in range(1, 3001)]


def noisy(base: float, spread: float, growth: float = 0.0, seed: int = 1) -> list[float]:
    """Normal noise and a saw-tooth of ten steps around `base`, which grows by so much in 1,000 steps."""
    draw = random.Random(seed)
    return [base + growth * step / 1000 + draw.gauss(0.0, spread) + spread * (step % 10) / 10 for step in STEPS]


def test_the_slope_and_its_error_are_those_of_least_squares() -> None:
    x, y = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 2.0, 4.0]
    # Three steps more in front are the warm-up; each of the four is a stretch of its own.
    found = trend("handles", [-1.5, -1.0, -0.5, *x], [9.0, 9.0, 9.0, *y])
    assert found.mean == pytest.approx(2.25)
    assert found.growth == pytest.approx(900.0)
    residuals = [one - (0.9 * at + 0.9) for at, one in zip(x, y, strict=True)]
    assert found.error == pytest.approx(1000 * math.sqrt(sum(each**2 for each in residuals) / 2 / 5.0))


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_leak_is_found_and_noise_is_none(seed: int) -> None:
    figures = {
        "memory_mib": noisy(400.0, 3.0, growth=10.0, seed=seed),
        "children_memory_mib": noisy(80.0, 3.0, seed=seed),
        "handles": [20.0 + step // 200 for step in STEPS],
        "threads": [46.0] * len(STEPS),
        "children": noisy(3.0, 0.2, seed=seed),
        "step_cpu_seconds": noisy(0.5, 0.05, growth=0.2, seed=seed),
    }
    found = trends(STEPS, figures)
    assert {name for name, one in found.items() if one.grows} == {"memory_mib", "handles", "step_cpu_seconds"}
    assert found["threads"].is_sure
    assert found["memory_mib"].growth == pytest.approx(10.0, abs=2.0)
    assert table(found).count("GROWS") == 3


def test_what_grew_before_the_run_was_warm_does_not_count() -> None:
    grown = [min(step, 900.0) for step in STEPS]
    assert trend("memory_mib", STEPS, grown).growth == pytest.approx(0.0, abs=1e-9)


def test_a_run_too_short_to_tell_says_so() -> None:
    short = slice(0, 40)
    found = trend("memory_mib", STEPS[short], noisy(400.0, 3.0)[short])
    assert not found.grows
    assert not found.is_sure
    with pytest.raises(ValueError, match="run for longer"):
        trend("memory_mib", [1.0], [1.0])
    assert blocks([1.0, 2.0], [5.0, 7.0]) == ([2.0], [7.0])
