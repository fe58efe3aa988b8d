"""Mismatch figures against NumPy."""

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch

from gspo_moe.algorithms import MismatchStatistics
from gspo_moe.errors import DataError
from tests.losses import correct, mismatch

CU_SEQLENS = torch.tensor([0, 4, 10, 13])
MASK = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1])
# p/q of the response tokens; 2 is exceeded upwards (2.5) and downwards (0.4), 1.9 and 0.55 stay inside.
TOKEN_RATIOS = [1.0, 2.5, 0.9, 1.9, 0.55, 1.0, 1.0, 0.4, 1.1]


def log_probs() -> tuple[torch.Tensor, torch.Tensor]:
    rollout = -torch.rand(13, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    trainer = rollout.masked_fill(MASK == 0, 7.0)
    trainer[MASK == 1] += torch.tensor(TOKEN_RATIOS, dtype=torch.float64).log()
    return trainer, rollout


def test_figures_match_numpy() -> None:
    d = np.log(TOKEN_RATIOS)
    sequence = np.exp([d[:3].mean(), d[3:7].mean(), d[7:].mean()])
    expected = {
        "mismatch/k3": np.mean(np.array(TOKEN_RATIOS) - 1 - d),
        "mismatch/token_ratio_above_2": 2 / 9,
        "mismatch/sequence_ratio_mean": sequence.mean(),
        "mismatch/sequence_ratio_std": sequence.std(),
        "mismatch/sequence_ratio_min": sequence.min(),
        "mismatch/sequence_ratio_max": sequence.max(),
    }
    assert mismatch(*log_probs(), CU_SEQLENS, MASK).to_metrics() == pytest.approx(expected, rel=1e-12)


def test_k3_is_of_the_rollouts_kl_to_the_trainer() -> None:
    """Ten tokens as often as the engine draws them: the mean is KL(rollout || trainer) itself, 0.1445."""
    rollout, trainer = (torch.tensor([p] * 9 + [1 - p], dtype=torch.float64).log() for p in (0.9, 0.99))
    found = mismatch(trainer, rollout, torch.tensor([0, 10]), torch.ones(10)).to_metrics()
    kl = 0.9 * math.log(0.9 / 0.99) + 0.1 * math.log(0.1 / 0.01)
    assert found["mismatch/k3"] == pytest.approx(kl, rel=1e-12)
    assert found["mismatch/k3"] == pytest.approx(0.1445, abs=5e-5)


def test_overflowing_ratios_leave_no_nan() -> None:
    trainer, rollout = torch.tensor([-1.0, -1.0]), torch.tensor([-801.0, -1.0])
    metrics = mismatch(trainer, rollout, torch.tensor([0, 1, 2]), torch.ones(2)).to_metrics()
    assert [metrics[f"mismatch/{name}"] for name in ("k3", "sequence_ratio_mean", "sequence_ratio_std")] == [
        math.inf
    ] * 3
    weights, statistics = correct("mask", "token", (0.5, 5.0), trainer, rollout, torch.tensor([0, 1, 2]), torch.ones(2))
    assert weights.weights.tolist() == [0.0, 1.0]
    assert statistics.to_metrics() == {"mismatch/weight_mean": 0.5, "mismatch/weight_cut": 0.5}


def test_merged_packs_equal_the_whole() -> None:
    trainer, rollout = log_probs()
    bounds = CU_SEQLENS.tolist()
    parts = [
        mismatch(trainer[a:b], rollout[a:b], torch.tensor([0, b - a]), MASK[a:b]) for a, b in itertools.pairwise(bounds)
    ]
    whole = mismatch(trainer, rollout, CU_SEQLENS, MASK).to_metrics()
    assert reduce(MismatchStatistics.merge, parts).to_metrics() == pytest.approx(whole, rel=1e-12)


def test_sequence_without_response_is_refused() -> None:
    with pytest.raises(DataError, match="sequence 2 of the pack has no response token"):
        mismatch(*log_probs(), CU_SEQLENS, MASK * (torch.arange(13) < 10))
