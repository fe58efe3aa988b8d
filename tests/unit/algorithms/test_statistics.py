"""Moments of ratios that hardly differ from 1, or from each other."""

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.statistics import Parts, Statistics, spread, spread_metrics


class Spread(Statistics):
    def to_metrics(self) -> dict[str, float]:
        return spread_metrics("x", "x", self, self.sums["count"].item())


def statistics(log_ratio: torch.Tensor, kept: torch.Tensor) -> Spread:
    sums, maxima = spread("x", log_ratio, kept.double())
    count: Parts = {"count": kept.double().sum()}
    return Spread({**sums, **count}, maxima)


def test_std_of_tiny_deviations_survives() -> None:
    log_ratio = 1e-9 * torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metrics = statistics(log_ratio, torch.ones(1000, dtype=torch.bool)).to_metrics()
    assert metrics["x_std"] == pytest.approx(np.expm1(log_ratio.numpy()).std(), rel=1e-10)


def test_one_ratio_has_no_spread() -> None:
    metrics = statistics(torch.tensor([0.3], dtype=torch.float64), torch.tensor([True])).to_metrics()
    assert metrics == pytest.approx({"x_mean": np.exp(0.3), "x_std": 0.0, "x_min": np.exp(0.3), "x_max": np.exp(0.3)})


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extremes_leave_out_what_is_not_kept(sign: float) -> None:
    near = statistics(sign * torch.tensor([0.0, 0.5, 0.2], dtype=torch.float64), torch.tensor([False, True, True]))
    far = statistics(sign * torch.tensor([0.0, 0.9, 9.0], dtype=torch.float64), torch.tensor([False, True, False]))
    metrics = near.merge(far).to_metrics()
    ratios = np.exp(sign * np.array([0.5, 0.2, 0.9]))
    expected = {"x_mean": ratios.mean(), "x_std": ratios.std(), "x_min": ratios.min(), "x_max": ratios.max()}
    assert metrics == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("largest", [400.0, 800.0, np.inf])
def test_spread_of_ratios_whose_squares_overflow_is_infinite(largest: float) -> None:
    metrics = statistics(torch.tensor([largest, 0.0]).double(), torch.tensor([True, True])).to_metrics()
    with np.errstate(over="ignore"):
        ratio = np.exp(largest)
    assert metrics == pytest.approx(
        {"x_mean": (1 + ratio) / 2, "x_std": np.inf, "x_min": 1.0, "x_max": ratio}, rel=1e-12
    )
