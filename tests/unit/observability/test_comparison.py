from __future__ import annotations

import itertools

import numpy as np
import pytest

from gspo_moe.observability.comparison import (
    CollapseRule,
    band,
    bootstrap_interval,
    estimate,
    find_collapse,
    paired_difference,
)


@pytest.mark.parametrize("samples", [[0.1, 0.4, 0.9], [3.0, -1.0, 2.5, 0.0], [1.0, 1.0, 1.0]])
def test_the_interval_is_that_of_all_resamples(samples: list[float]) -> None:
    every = [np.mean(draw) for draw in itertools.product(samples, repeat=len(samples))]
    low, high = bootstrap_interval(np.array(samples))
    # 2000 draws find the percentiles of a distribution of few atoms up to a neighbouring atom.
    step = 1.01 * (max(samples) - min(samples)) / len(samples)
    assert abs(low - np.quantile(every, 0.025)) <= step
    assert abs(high - np.quantile(every, 0.975)) <= step
    assert min(samples) <= low <= high <= max(samples)


def test_many_samples_give_the_normal_interval() -> None:
    samples = np.random.default_rng(3).standard_normal(400)
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    low, high = bootstrap_interval(samples)
    np.testing.assert_allclose([low, high], samples.mean() + np.array([-1.96, 1.96]) * error, atol=0.1 * error)


def test_an_estimate_leaves_out_what_is_not_finite_and_one_value_has_no_interval() -> None:
    three = estimate([1.0, np.nan, 2.0, 6.0])
    assert (three.mean, three.seeds) == (3.0, 3)
    assert 1.0 <= three.low < 3.0 < three.high <= 6.0
    one = estimate([0.5, np.inf])
    assert (one.mean, one.seeds) == (0.5, 1)
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    assert not one.excludes_zero
    assert estimate([]).seeds == 0


def test_a_band_takes_at_each_place_the_seeds_that_are_there() -> None:
    values = np.array([[1.0, 2.0, np.nan, np.nan], [3.0, 5.0, 7.0, np.nan], [5.0, np.nan, 9.0, np.nan]])
    found = band(values)
    np.testing.assert_array_equal(found.seeds, [3, 2, 2, 0])
    np.testing.assert_array_equal(found.mean, [3.0, 3.5, 8.0, np.nan])
    for place, present in enumerate(([1.0, 3.0, 5.0], [2.0, 5.0], [7.0, 9.0])):
        alone = bootstrap_interval(np.array(present))
        np.testing.assert_allclose([found.low[place], found.high[place]], alone, rtol=1e-12)
    assert np.isnan(found.low[3])


def test_paired_differences_take_the_seeds_that_both_arms_have() -> None:
    # Seeds differ by far more than arms do, which pairing removes.
    difference = paired_difference({1: 10.1, 2: 20.2, 3: 30.3, 9: 0.0}, {3: 30.0, 2: 20.0, 1: 10.0, 4: 0.0})
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(0.2)
    assert difference.excludes_zero
    assert paired_difference({1: 1.0}, {2: 1.0}).seeds == 0


RISE = np.linspace(0.1, 1.0, 40)


@pytest.mark.parametrize(
    ("rewards", "index"),
    [
        (RISE, None),
        (np.concatenate([RISE, np.full(30, 0.1)]), 42),  # the trailing mean of 5 has seen 3 of the low values
        (np.concatenate([RISE, np.full(8, 0.0), np.full(10, 0.9)]), None),  # it comes back
        (np.concatenate([RISE, np.full(8, 0.0)]), None),  # too short to tell
        (np.concatenate([RISE, np.full(30, 0.8)]), None),  # above the share
        (np.concatenate([RISE, np.full(30, np.nan)]), 42),
        (np.zeros(60), None),
        (-RISE, None),  # no positive best to fall from
        (np.array([1.0, 0.0]), None),
    ],
)
def test_collapse_is_a_fall_that_stays(rewards: np.ndarray, index: int | None) -> None:
    assert find_collapse(rewards) == index


def test_the_rule_prints_its_own_numbers() -> None:
    rule = CollapseRule(share=0.25, window=7, patience=11)
    assert all(number in str(rule) for number in ("25%", "7 steps", "11 steps"))
    assert find_collapse(np.concatenate([RISE, np.full(30, 0.4)])) is not None
    assert find_collapse(np.concatenate([RISE, np.full(30, 0.4)]), rule) is None
