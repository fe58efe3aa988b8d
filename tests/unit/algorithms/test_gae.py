"""Advantages and returns against the definition, summed term by term in Python floats."""

from __future__ import annotations

import functools
import itertools
import statistics
from fractions import Fraction

import pytest
import torch

from gspo_moe.algorithms.gae import StepMeans, Whitening
from gspo_moe.errors import DataError
from tests.losses import gae

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


def whitened(advantages: torch.Tensor, mask: torch.Tensor, cut: int) -> torch.Tensor:
    """As two packs, of the tokens before and behind `cut`."""
    parts = [part for part in (slice(0, cut), slice(cut, len(mask))) if part.start < part.stop]
    means = [StepMeans.of_pack(advantages[part], advantages[part], mask[part]) for part in parts]
    mean = functools.reduce(StepMeans.merge, means).advantage
    squares = [Whitening.of_pack(advantages[part], mask[part], mean) for part in parts]
    whitening = functools.reduce(Whitening.merge, squares)
    return torch.cat([whitening.whiten(advantages[part], mask[part], mean) for part in parts])


@pytest.mark.parametrize(("offset", "error"), [(0.0, 1e-12), (1e7, 1e-8), (-1e9, 1e-6)])
def test_whitened_over_packs_they_have_mean_zero_and_deviation_one(offset: float, error: float) -> None:
    """Wherever they lie: a difference of raw moments is wrong by 4 % where the mean is 1e7 deviations."""
    pack = drawn()
    mask = pack["response_mask"]
    advantages = torch.where(mask != 0, gae(**pack, gamma=1.0, lam=0.95)[0] + offset, 0.0)
    found = whitened(advantages, mask, 7)
    kept = [Fraction(value) for value, on in zip(advantages.tolist(), MASK, strict=True) if on]
    mean, deviation = statistics.mean(kept), float(statistics.variance(kept)) ** 0.5
    exact = [float(Fraction(value) - mean) for value in advantages.tolist()]
    wanted = [on * value / (deviation + 1e-8) for value, on in zip(exact, MASK, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=error, abs=error)


def test_one_token_alone_has_no_deviation() -> None:
    assert whitened(torch.ones(1).double(), torch.ones(1), 1).tolist() == [0.0]


def test_shapes_that_do_not_fit_are_refused() -> None:
    pack = drawn()
    with pytest.raises(DataError, match=r"got \[3\] rewards for 4 sequences"):
        gae(**{**pack, "rewards": torch.zeros(3)}, gamma=1.0, lam=1.0)
    with pytest.raises(DataError, match="give one a token"):
        gae(**{**pack, "values": torch.zeros(3)}, gamma=1.0, lam=1.0)
