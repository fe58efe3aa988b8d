"""PPO's value loss, its gradient and its figures against plain loops."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.statistics import Parts
from gspo_moe.algorithms.value import ValueMeans, value_loss, value_metrics
from gspo_moe.errors import DataError

COUNT, TOKENS = 40, 90.0  # tokens of the pack, response tokens of the mini-batch
NEAR = ValueMeans(torch.tensor(0.3).double(), torch.tensor(-0.2).double())
SIZES: dict[str, Any] = {"num_tokens": TOKENS, "means": NEAR}


def drawn() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    old, noise, returns = (torch.randn(COUNT, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(COUNT, generator=generator) < 0.7).float()
    return old + 0.4 * noise, old, returns, mask


@pytest.mark.parametrize("clip", [0.2, None])
def test_loss_gradient_and_figures_are_the_formulas(clip: float | None) -> None:
    values, old, returns, mask = drawn()
    loss, gradient, clipped = 0.0, [0.0] * COUNT, 0
    kept = [t for t in range(COUNT) if mask[t]]
    for t in kept:
        v, o, r = values[t].item(), old[t].item(), returns[t].item()
        bounded = v if clip is None else min(max(v, o - clip), o + clip)
        loss += 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
        if (bounded - r) ** 2 > (v - r) ** 2:
            clipped += 1
        else:
            gradient[t] = (v - r) / TOKENS
    leaf = values.clone().requires_grad_()
    found = value_loss(leaf, old, returns, mask, value_clip=clip, **SIZES)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss / TOKENS, rel=1e-12)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-12, atol=1e-16)
    assert (0 < clipped < len(kept)) == (clip is not None)
    metrics = value_metrics(found.sums, len(kept))
    assert metrics["value/loss"] == pytest.approx(loss / len(kept), rel=1e-12)
    assert metrics["value/clip_fraction"] == pytest.approx(clipped / len(kept), rel=1e-12)
    error = statistics.pvariance([returns[t].item() - old[t].item() for t in kept])
    explained = 1 - error / statistics.pvariance([returns[t].item() for t in kept])
    assert metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-9)


def test_values_at_the_old_ones_have_the_whole_gradient() -> None:
    _, old, returns, mask = drawn()
    leaf = old.clone().requires_grad_()
    value_loss(leaf, old, returns, mask, value_clip=0.2, **SIZES).loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, mask * (old - returns) / TOKENS, rtol=1e-12, atol=0)


def test_parts_add_up() -> None:
    values, old, returns, mask = drawn()
    whole = value_loss(values, old, returns, mask, value_clip=0.2, **SIZES)
    cut = [slice(0, 13), slice(13, COUNT)]
    parts = [value_loss(values[s], old[s], returns[s], mask[s], value_clip=0.2, **SIZES) for s in cut]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    sums: Parts = {name: parts[0].sums[name] + parts[1].sums[name] for name in whole.sums}
    assert value_metrics(sums, 28) == pytest.approx(value_metrics(whole.sums, 28), rel=1e-12)


def test_equal_returns_have_no_explained_variance() -> None:
    values, old, _, mask = drawn()
    found = value_loss(values, old, torch.ones(COUNT), mask, value_clip=None, **SIZES)
    assert "value/explained_variance" not in value_metrics(found.sums, int(mask.sum()))


def test_explained_variance_stands_far_from_zero() -> None:
    values, old, returns, mask = drawn()
    near = value_metrics(value_loss(values, old, returns, mask, value_clip=None, **SIZES).sums, 28)
    far = ValueMeans(NEAR.returns + 1e8, NEAR.errors + 1e8)
    moved = value_loss(values, old, returns + 1e8, mask, value_clip=None, num_tokens=TOKENS, means=far)
    name = "value/explained_variance"
    assert value_metrics(moved.sums, 28)[name] == pytest.approx(near[name], rel=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    values, old, returns, mask = drawn()
    with pytest.raises(DataError, match="one a token of the same pack"):
        value_loss(values, old[1:], returns, mask, value_clip=None, **SIZES)
