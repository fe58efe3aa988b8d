"""sapo against its formula in plain loops, float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.policies.sapo import SapoOptions
from gspo_moe.config import load_config
from gspo_moe.errors import ConfigError
from tests.losses import policy_loss
from tests.unit.algorithms.test_variants import BOUNDS, SEQUENCES, drawn


def run(pack: dict[str, torch.Tensor], **more: Any) -> tuple[Any, np.ndarray]:
    log_probs = pack["log_probs"].clone().requires_grad_()
    arguments: dict[str, Any] = {**pack, "log_probs": log_probs, **more}
    result = policy_loss("sapo", **arguments)
    return result, torch.autograd.grad(result.loss, log_probs)[0].numpy()


@pytest.mark.parametrize("options", [None, SapoOptions(tau_positive=0.5, tau_negative=3.0)])
def test_loss_and_gradient_are_the_papers(options: SapoOptions | None) -> None:
    pack = drawn()
    temperatures = (1.0, 1.05) if options is None else (0.5, 3.0)
    p, q, mask = (pack[name].tolist() for name in ("log_probs", "old_log_probs", "response_mask"))
    loss, gradient = 0.0, [0.0] * 28
    for advantage, (start, end) in zip(pack["advantages"].tolist(), itertools.pairwise(BOUNDS), strict=True):
        tau = temperatures[advantage < 0]
        tokens = [t for t in range(start, end) if mask[t]]
        for t in tokens:
            ratio, share = math.exp(p[t] - q[t]), 1 / len(tokens) / SEQUENCES
            gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
            loss -= share * 4 / tau * gate * advantage
            gradient[t] -= share * 4 * gate * (1 - gate) * ratio * advantage
    result, mine = run(pack, num_sequences=SEQUENCES, options=options)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(mine, gradient, rtol=1e-11, atol=1e-15)
    assert result.metrics["clip_fraction/token"] == 0


def test_equal_policies_give_the_policy_gradient() -> None:
    pack = drawn()
    pack["log_probs"] = pack["old_log_probs"]
    _, gradient = run(pack)
    for advantage, (start, end) in zip(pack["advantages"].tolist(), itertools.pairwise(BOUNDS), strict=True):
        mask = pack["response_mask"][start:end].numpy()
        np.testing.assert_allclose(gradient[start:end], -advantage * mask / mask.sum() / 4, rtol=1e-14)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_ratios_beyond_float64_saturate_the_gate(advantage: float) -> None:
    pack = {
        "log_probs": torch.tensor([-1.0, -1.0], dtype=torch.float64),
        "old_log_probs": torch.tensor([-801.0, -torch.inf], dtype=torch.float64),
        "advantages": torch.tensor([advantage, advantage], dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, 1, 2]),
        "response_mask": torch.ones(2),
    }
    result, gradient = run(pack)
    assert result.loss.item() == pytest.approx(-4 / (1.0 if advantage > 0 else 1.05) * advantage, abs=1e-15)
    assert gradient.tolist() == [0.0, 0.0]


def test_its_temperatures_are_options_and_it_has_no_clip() -> None:
    name = "algorithm.name=sapo"
    assert load_config(None, [name]).algorithm.options == {"tau_positive": 1.0, "tau_negative": 1.05}
    assert load_config(None, [name, "algorithm.options.tau_negative=2"]).algorithm.settings.tau_negative == 2
    with pytest.raises(ConfigError, match="clips nothing by"):
        load_config(None, [name, "algorithm.clip_high=0.2"])
