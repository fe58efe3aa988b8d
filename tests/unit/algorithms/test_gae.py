"""Advantages and returns against the definition, summed term by term in Python floats."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from gspo_moe.algorithms.gae import Moments, gae
from gspo_moe.errors import DataError

BOUNDS = [0, 6, 7, 16, 28]
MASK = [0, 1, 1, 1, 1, 1] + [1] + [0, 0, 1, 1, 0, 0, 1, 1, 1] + [0] * 11 + [1]  # tool tokens in the third


def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "values": torch.randn(28, generator=generator, dtype=torch.float64),
        "rewards": torch.randn(4, generator=generator, dtype=torch.float64),
        "cu_seqlens": torch.tensor(BOUNDS),
        "response_mask": torch.tensor(MASK, dtype=torch.float32),
    }


def expected(pack: dict[str, torch.Tensor], gamma: float, lam: float) -> list[float]:
    """A_k = sum_j (gamma lam)^j (r_(k+j) + gamma V_(k+j+1) - V_(k+j)) over the response tokens behind k."""
    found = [0.0] * 28
    for reward, (start, end) in zip(pack["rewards"].tolist(), itertools.pairwise(BOUNDS), strict=True):
        tokens = [t for t in range(start, end) if MASK[t]]
        values = [pack["values"][t].item() for t in tokens] + [0.0]
        rewards = [0.0] * (len(tokens) - 1) + [reward]
        for k, t in enumerate(tokens):
            for j in range(len(tokens) - k):
                delta = rewards[k + j] + gamma * values[k + j + 1] - values[k + j]
                found[t] += (gamma * lam) ** j * delta
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_are_the_discounted_sums_of_errors(gamma: float, lam: float) -> None:
    pack = drawn()
    wanted = expected(pack, gamma, lam)
    # What the value head says of prompt and tool tokens has no effect.
    off = torch.where(pack["response_mask"] != 0, pack["values"], torch.nan)
    advantages, returns = gae(**{**pack, "values": off}, gamma=gamma, lam=lam)
    assert advantages.dtype == returns.dtype == torch.float64
    assert advantages.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-14)
    sums = [wanted[t] + MASK[t] * pack["values"][t].item() for t in range(28)]
    assert returns.tolist() == pytest.approx(sums, rel=1e-12, abs=1e-14)


def test_without_discount_and_with_lam_one_the_return_is_the_reward() -> None:
    pack = drawn()
    _, returns = gae(**pack, gamma=1.0, lam=1.0)
    for reward, (start, end) in zip(pack["rewards"].tolist(), itertools.pairwise(BOUNDS), strict=True):
        assert [value for value, on in zip(returns[start:end].tolist(), MASK[start:end], strict=True) if on] == (
            pytest.approx([reward] * sum(MASK[start:end]), rel=1e-12)
        )


def test_whitened_over_packs_they_have_mean_zero_and_deviation_one() -> None:
    pack = drawn()
    advantages, _ = gae(**pack, gamma=1.0, lam=0.95)
    parts = [slice(0, 7), slice(7, 28)]
    moments = Moments.merge(*(Moments.of_pack(advantages[part], pack["response_mask"][part]) for part in parts))
    found = torch.cat([moments.whiten(advantages[part], pack["response_mask"][part]) for part in parts])
    kept = [value for value, on in zip(advantages.tolist(), MASK, strict=True) if on]
    mean, deviation = statistics.fmean(kept), statistics.stdev(kept)
    wanted = [on * (value - mean) / (deviation + 1e-8) for value, on in zip(advantages.tolist(), MASK, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-13)


def test_one_token_alone_has_no_deviation() -> None:
    mask = torch.ones(1)
    assert Moments.of_pack(torch.ones(1).double(), mask).whiten(torch.ones(1).double(), mask).tolist() == [0.0]


def test_shapes_that_do_not_fit_are_refused() -> None:
    pack = drawn()
    with pytest.raises(DataError, match=r"got \[3\] rewards for 4 sequences"):
        gae(**{**pack, "rewards": torch.zeros(3)}, gamma=1.0, lam=1.0)
    with pytest.raises(DataError, match="give one a token"):
        gae(**{**pack, "values": torch.zeros(3)}, gamma=1.0, lam=1.0)
