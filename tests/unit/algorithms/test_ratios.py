"""Precision of the sequence ratio and of k3 where float32 or the naive formula loses it."""

from fractions import Fraction

import pytest
import torch

from gspo_moe.algorithms.ratios import Segments, k3_from_sampler


def test_sums_of_long_responses_are_exact_to_float64() -> None:
    values = torch.full((30_000,), 0.1, dtype=torch.float64)
    segments = Segments.of_pack(torch.tensor([0, 10_000, 30_000], dtype=torch.int32), torch.ones(30_000))
    exact = [float(Fraction(0.1) * count) for count in (10_000, 20_000)]
    assert segments.sum(values).tolist() == pytest.approx(exact, rel=1e-12)
    assert segments.mean(values).tolist() == pytest.approx([0.1, 0.1], rel=1e-12)


def test_k3_of_small_log_ratios_is_half_their_square() -> None:
    log_ratio = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    assert k3_from_sampler(log_ratio).tolist() == pytest.approx([5e-13, 5e-13], rel=1e-3)


def test_k3_from_the_sampler_has_its_kl_as_mean() -> None:
    q, p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    mean = (q * k3_from_sampler((p / q).log())).sum().item()
    assert mean == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-12)
    overflow = torch.tensor([800.0, torch.inf, -800.0, -torch.inf], dtype=torch.float64)
    assert k3_from_sampler(overflow).tolist() == [torch.inf, torch.inf, 799.0, torch.inf]
