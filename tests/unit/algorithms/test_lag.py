"""Figures of tokens by their lag against plain loops."""

import math
from collections import defaultdict

import pytest
import torch

from gspo_moe.algorithms.lag import MismatchByLag, mismatch_by_lag


def test_log_ratios_are_summed_up_by_lag_and_nothing_else_counts() -> None:
    generator = torch.Generator().manual_seed(3)
    trainer, rollout = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    lag = torch.randint(-1, 3, (50,), generator=generator)
    rollout[lag < 0] = torch.nan
    parts = [mismatch_by_lag(trainer[s], rollout[s], lag[s], 4) for s in (slice(0, 20), slice(20, 50))]
    found = parts[0].merge(parts[1]).to_metrics()
    by_lag = defaultdict(list)
    for one, other, number in zip(trainer.tolist(), rollout.tolist(), lag.tolist(), strict=True):
        if number >= 0:
            by_lag[number].append(one - other)
    expected = {}
    for number, ratios in by_lag.items():
        mean = sum(ratios) / len(ratios)
        expected[f"mismatch/k3/lag_{number}"] = sum(math.exp(d) - 1 - d for d in ratios) / len(ratios)
        expected[f"mismatch/token_ratio_above_2/lag_{number}"] = sum(abs(d) > math.log(2) for d in ratios) / len(ratios)
        expected[f"mismatch/log_ratio_std/lag_{number}"] = math.sqrt(sum((d - mean) ** 2 for d in ratios) / len(ratios))
    assert found == pytest.approx(expected, rel=1e-12)
    assert set(by_lag) == {0, 1, 2}, "of lag 3 there is no token and no figure"


def test_without_tokens_there_are_no_figures() -> None:
    nothing = torch.zeros(3)
    assert mismatch_by_lag(nothing, nothing, torch.full((3,), -1), 2).to_metrics() == {}
    assert isinstance(mismatch_by_lag(nothing, nothing, torch.zeros(3, dtype=torch.int64), 2), MismatchByLag)
