"""The two sequence-level objectives against each other and, per token, against a plain loop."""

import itertools

import numpy as np
import pytest
import torch

from gspo_moe.algorithms import PolicyLoss
from tests.losses import policy_loss

CU_SEQLENS = [0, 4, 5, 14, 20]
CLIPS = (3e-4, 4e-4)


def pack() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_probs, old_log_probs and mask; the sequences' log-ratios are about 6e-4, -6e-4, 1e-5 and -1e-5."""
    generator = torch.Generator().manual_seed(11)
    old = -torch.rand(20, generator=generator, dtype=torch.float64)
    shift = torch.tensor([6e-4, -6e-4, 1e-5, -1e-5], dtype=torch.float64)
    noise = 1e-5 * torch.randn(20, generator=generator, dtype=torch.float64)
    mask = torch.ones(20, dtype=torch.bool)
    mask[[0, 6, 14]] = False
    return (old + noise + shift.repeat_interleave(torch.tensor([4, 1, 9, 6]))).requires_grad_(), old, mask


def loss_and_gradient(algorithm: str, advantages: torch.Tensor) -> tuple[PolicyLoss, torch.Tensor]:
    log_probs, old, mask = pack()
    result = policy_loss(
        algorithm, log_probs, old, advantages, torch.tensor(CU_SEQLENS), mask, clip_low=CLIPS[0], clip_high=CLIPS[1]
    )
    return result, torch.autograd.grad(result.loss, log_probs)[0]


@pytest.mark.parametrize("signs", [[1, 1, 1, 1], [1, -1, 1, -1], [-1, 1, -1, 1]])
@pytest.mark.parametrize("per_token", [False, True])
def test_gspo_token_equals_gspo_for_equal_advantages_along_a_sequence(signs: list[int], per_token: bool) -> None:
    advantages = torch.tensor(signs, dtype=torch.float64) * torch.tensor([0.5, 0.7, 1.1, 1.3], dtype=torch.float64)
    expected, expected_gradient = loss_and_gradient("gspo", advantages)
    spread = advantages.repeat_interleave(torch.tensor(CU_SEQLENS).diff()) if per_token else advantages
    result, gradient = loss_and_gradient("gspo_token", spread)
    assert result.metrics == pytest.approx(expected.metrics, rel=1e-12)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=0)


def test_gspo_token_with_per_token_advantages_matches_a_loop() -> None:
    log_probs, old, mask = pack()
    advantages = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    result, gradient = loss_and_gradient("gspo_token", advantages)
    d, a, m = (log_probs.detach() - old).numpy(), advantages.numpy(), mask.numpy()
    loss, expected, clipped = 0.0, np.zeros(20), np.zeros(20)
    for start, end in itertools.pairwise(CU_SEQLENS):
        tokens = [t for t in range(start, end) if m[t]]
        ratio = np.exp(np.mean(d[tokens]))
        for t in tokens:
            inside = min(max(ratio, 1 - CLIPS[0]), 1 + CLIPS[1])
            loss -= min(ratio * a[t], inside * a[t]) / len(tokens) / 4
            clipped[t] = inside * a[t] < ratio * a[t]
            expected[t] = 0.0 if clipped[t] else -ratio * a[t] / len(tokens) / 4
    assert 0 < clipped.sum() < m.sum()
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=0)
    sequences = [clipped[start:end].any() for start, end in itertools.pairwise(CU_SEQLENS)]
    assert result.metrics["clip_fraction/token"] == pytest.approx(clipped.sum() / m.sum())
    assert result.metrics["clip_fraction/sequence"] == pytest.approx(np.mean(sequences))
