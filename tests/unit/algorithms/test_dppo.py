"""dppo against its formula in plain loops, float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.policies.dppo import DppoOptions
from gspo_moe.config import load_config
from gspo_moe.errors import ConfigError
from tests.losses import policy_loss
from tests.unit.algorithms.test_variants import BOUNDS, SEQUENCES, TOKENS, drawn

COUNTS: dict[str, Any] = {"num_sequences": SEQUENCES, "num_tokens": TOKENS}


def run(pack: dict[str, torch.Tensor], **more: Any) -> tuple[Any, np.ndarray]:
    log_probs = pack["log_probs"].clone().requires_grad_()
    arguments: dict[str, Any] = {**pack, "log_probs": log_probs, **more}
    result = policy_loss("dppo", **arguments)
    return result, torch.autograd.grad(result.loss, log_probs)[0].numpy()


def likely() -> dict[str, torch.Tensor]:
    """The pack of `drawn` with log-probs that are those of probabilities."""
    pack = drawn()
    pack["log_probs"] = pack["log_probs"].clamp(max=-0.02)
    return pack


@pytest.mark.parametrize(
    ("options", "kind", "delta"),
    [
        (None, "tv", 0.15),
        (DppoOptions(divergence="kl"), "kl", 0.05),
        (DppoOptions(delta=0.05), "tv", 0.05),
        (DppoOptions(divergence="kl", delta=0.2), "kl", 0.2),
    ],
)
def test_loss_gradient_and_dropped_tokens_are_the_papers(options: DppoOptions | None, kind: str, delta: float) -> None:
    pack = likely()
    p, q, mask = (pack[name].tolist() for name in ("log_probs", "old_log_probs", "response_mask"))
    loss, gradient, dropped, beyond = 0.0, [0.0] * 28, 0, 0
    for advantage, (start, end) in zip(pack["advantages"].tolist(), itertools.pairwise(BOUNDS), strict=True):
        for t in range(start, end):
            if not mask[t]:
                continue
            pi, mu = math.exp(p[t]), math.exp(q[t])
            kl = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
            far = (abs(pi - mu) if kind == "tv" else kl) > delta
            beyond += far
            if far and (advantage > 0) == (pi > mu):
                dropped += 1
                continue
            loss -= pi / mu * advantage / TOKENS
            gradient[t] -= pi / mu * advantage / TOKENS
    result, mine = run(pack, **COUNTS, options=options)
    assert 0 < dropped < beyond < 24
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(mine, gradient, rtol=1e-11, atol=1e-15)
    assert result.metrics["clip_fraction/token"] == pytest.approx(dropped / 24, rel=1e-12)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("old", [-801.0, -math.inf, 0.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_certain_and_impossible_tokens_leave_no_nan(divergence: str, old: float, advantage: float) -> None:
    for new in (-1.0, 0.0):
        pack = {
            "log_probs": torch.tensor([new, -1.0], dtype=torch.float64),
            "old_log_probs": torch.tensor([old, -1.0], dtype=torch.float64),
            "advantages": torch.tensor([advantage, 0.5], dtype=torch.float64),
            "cu_seqlens": torch.tensor([0, 1, 2]),
            "response_mask": torch.ones(2),
        }
        result, gradient = run(pack, options=DppoOptions.model_validate({"divergence": divergence}))
        assert not np.isnan(gradient).any()
        assert not math.isnan(result.loss.item())
        far = old < new if advantage > 0 else old > new
        assert result.metrics["clip_fraction/token"] == (0.5 if far and advantage else 0.0)


def test_divergence_and_delta_are_options() -> None:
    name = "algorithm.name=dppo"
    assert load_config(None, [name]).algorithm.options == {"divergence": "tv", "delta": None}
    assert load_config(None, [name, "algorithm.options.divergence=kl"]).algorithm.settings.divergence == "kl"
    with pytest.raises(ConfigError, match=r"algorithm\.options\.divergence='js': expected 'tv' or 'kl'"):
        load_config(None, [name, "algorithm.options.divergence=js"])
