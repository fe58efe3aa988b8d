"""minirl, vespo and luspo against their formulas in plain loops, float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.policies.minirl import MinirlOptions
from gspo_moe.algorithms.policies.vespo import VespoOptions
from gspo_moe.config import load_config
from gspo_moe.errors import ConfigError
from tests.losses import policy_loss
from tests.unit.algorithms.test_variants import BOUNDS, SEQUENCES, TOKENS, drawn


def run(algorithm: str, pack: dict[str, torch.Tensor], **more: Any) -> tuple[Any, np.ndarray]:
    log_probs = pack["log_probs"].clone().requires_grad_()
    arguments: dict[str, Any] = {**pack, "log_probs": log_probs, "num_sequences": SEQUENCES, "num_tokens": TOKENS}
    result = policy_loss(algorithm, **(arguments | more))
    return result, torch.autograd.grad(result.loss, log_probs)[0].numpy()


def sequences(pack: dict[str, torch.Tensor]) -> list[tuple[float, list[int], list[float]]]:
    """Advantage, response tokens and their log-ratios of each sequence."""
    p, q, mask = (pack[name].tolist() for name in ("log_probs", "old_log_probs", "response_mask"))
    found = []
    for advantage, (start, end) in zip(pack["advantages"].tolist(), itertools.pairwise(BOUNDS), strict=True):
        tokens = [t for t in range(start, end) if mask[t]]
        found.append((advantage, tokens, [p[t] - q[t] for t in tokens]))
    return found


def same(result: Any, gradient: np.ndarray, loss: float, expected: list[float]) -> None:
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("truncation", [5.0, None, 1.5])
def test_minirl_is_the_papers(truncation: float | None) -> None:
    pack = drawn()
    pack["log_probs"][6] = pack["old_log_probs"][6] + 2.0  # a ratio above 5, of a negative advantage
    loss, gradient, dropped = 0.0, [0.0] * 28, 0
    for advantage, tokens, log_ratios in sequences(pack):
        for t, d in zip(tokens, log_ratios, strict=True):
            ratio = math.exp(d)
            if (advantage > 0 and ratio > 1.27) or (advantage < 0 and ratio < 0.8):
                dropped += 1
                continue
            weight = min(ratio, truncation or math.inf) * advantage / SEQUENCES
            loss -= weight * pack["log_probs"][t].item()
            gradient[t] -= weight
    options = None if truncation == 5.0 else MinirlOptions(truncation=truncation)
    result, mine = run("minirl", pack, options=options)
    same(result, mine, loss, gradient)
    assert 0 < dropped < 24
    assert result.metrics["clip_fraction/token"] == pytest.approx(dropped / 24, rel=1e-12)


OTHER = VespoOptions(k_positive=1.0, lambda_positive=0.5, k_negative=0.0, lambda_negative=0.25)


@pytest.mark.parametrize(("options", "constants"), [(None, (2, 3, 3, 2)), (OTHER, (1, 0.5, 0, 0.25))])
def test_vespo_is_the_papers(options: VespoOptions | None, constants: tuple[float, ...]) -> None:
    pack = drawn()
    # Sums over twelve tokens would leave W beyond where phi is anything.
    pack["log_probs"] = pack["old_log_probs"] + 0.2 * (pack["log_probs"] - pack["old_log_probs"])
    loss, gradient, phis = 0.0, [0.0] * 28, 0.0
    for advantage, tokens, log_ratios in sequences(pack):
        k, decay = constants[:2] if advantage > 0 else constants[2:]
        ratio = math.prod(math.exp(d) for d in log_ratios)
        phi = ratio**k * math.exp(decay * (1 - ratio))
        assert not 0.99 < phi < 1.01
        phis += phi * len(tokens) / 24
        for t in tokens:
            loss -= phi * advantage * pack["log_probs"][t].item() / TOKENS
            gradient[t] -= phi * advantage / TOKENS
    result, mine = run("vespo", pack, options=options)
    same(result, mine, loss, gradient)
    assert result.metrics["algorithm/phi"] == pytest.approx(phis, rel=1e-12)


@pytest.mark.parametrize("old", [-801.0, 801.0, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("k", [0.0, 2.0])
def test_vespos_weight_fades_where_the_ratio_leaves_float64(old: float, advantage: float, k: float) -> None:
    pack = {
        "log_probs": torch.tensor([-1.0, -1.0], dtype=torch.float64),
        "old_log_probs": torch.tensor([old, -1.0], dtype=torch.float64),
        "advantages": torch.tensor([advantage, 0.5], dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, 1, 2]),
        "response_mask": torch.ones(2),
    }
    result, gradient = run("vespo", pack, options=VespoOptions(k_positive=k, k_negative=k))
    gone = old < 0 or k > 0  # W vanishes where the old policy was surer: W^0 exp(lambda) is left
    phi = 0.0 if gone else math.exp(3.0 if advantage > 0 else 2.0)
    assert gradient[0] == pytest.approx(-phi * advantage / TOKENS, rel=1e-12)
    assert gradient[1] == pytest.approx(-0.5 / TOKENS, rel=1e-12)
    assert math.isfinite(result.loss.item())


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_minirls_weight_is_bounded_where_the_ratio_is_infinite(advantage: float) -> None:
    pack = {
        "log_probs": torch.tensor([-1.0], dtype=torch.float64),
        "old_log_probs": torch.tensor([-math.inf], dtype=torch.float64),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, 1]),
        "response_mask": torch.ones(1),
    }
    result, gradient = run("minirl", pack)
    expected = 5.0 if advantage < 0 else 0.0
    assert gradient[0] == pytest.approx(expected / SEQUENCES, rel=1e-12)
    assert result.loss.item() == pytest.approx(-expected / SEQUENCES, rel=1e-12)


def test_luspo_is_gspo_by_length() -> None:
    pack = drawn()
    low, high = 0.005, 0.009
    loss, gradient, clipped = 0.0, [0.0] * 28, 0
    for advantage, tokens, log_ratios in sequences(pack):
        ratio = math.exp(sum(log_ratios) / len(tokens))
        bounded = min(max(ratio, 1 - low), 1 + high)
        value = min(ratio * advantage, bounded * advantage)
        loss -= len(tokens) * value / SEQUENCES
        if value != ratio * advantage:
            clipped += len(tokens)
            continue
        for t in tokens:
            gradient[t] -= ratio * advantage / SEQUENCES
    result, mine = run("luspo", pack, clip_low=low, clip_high=high)
    same(result, mine, loss, gradient)
    assert 0 < clipped < 24
    assert result.metrics["clip_fraction/token"] == pytest.approx(clipped / 24, rel=1e-12)


def test_clips_and_options_are_the_papers() -> None:
    of = {name: load_config(None, [f"algorithm.name={name}"]).algorithm for name in ("minirl", "vespo", "luspo")}
    assert of["minirl"].clips == (0.2, 0.27)
    assert of["luspo"].clips == (2e-3, 2.5e-3)
    assert of["minirl"].options == {"truncation": 5.0}
    positive, negative = {"k_positive": 2.0, "lambda_positive": 3.0}, {"k_negative": 3.0, "lambda_negative": 2.0}
    assert of["vespo"].options == positive | negative
    for wrong in ("name=luspo algorithm.clip_high=0.2", "name=vespo algorithm.options.lambda_negative=0"):
        with pytest.raises(ConfigError):
            load_config(None, f"algorithm.{wrong}".split())
