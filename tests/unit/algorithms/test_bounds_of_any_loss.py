"""What may be set beside a loss: dual clip, off-policy mask, geometric mask, each against plain loops in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.off_policy_mask import OffPolicyMask
from gspo_moe.config import load_config
from gspo_moe.errors import ConfigError
from tests.losses import CLIPS, SPECS, correct, policy_loss
from tests.unit.algorithms.test_variants import BOUNDS, LONGEST, SEQUENCES, TOKENS, drawn, expected, found, mismatched

CLIPPED = tuple(name for name, spec in SPECS.items() if spec.dual_clip)


def bounded_ratio(algorithm: str, pack: dict[str, torch.Tensor]) -> list[float]:
    """What is clipped, by token."""
    d, mask = (pack["log_probs"] - pack["old_log_probs"]).tolist(), pack["response_mask"].tolist()
    ratios = [math.exp(each) for each in d]
    if SPECS[algorithm].ratio == "sequence":
        for start, end in itertools.pairwise(BOUNDS):
            own = [d[t] for t in range(start, end) if mask[t]]
            ratios[start:end] = [math.exp(sum(own) / len(own))] * (end - start)
    return ratios


@pytest.mark.parametrize("algorithm", CLIPPED)
def test_dual_clip_bounds_what_negative_advantages_cost(algorithm: str) -> None:
    """max(min(w A, clip(w) A), c A) for A < 0: where w > c, c A without a gradient, and nothing else is touched."""
    pack, c = drawn(algorithm), 1.3 if SPECS[algorithm].ratio == "token" else 1.05
    pack["advantages"] = -pack["advantages"].abs()
    low, high = CLIPS[algorithm]
    ratios, mask = bounded_ratio(algorithm, pack), pack["response_mask"].tolist()
    plain, before = found(algorithm, pack)
    result, after = found(algorithm, pack, dual_clip=c)
    saved, beyond, clipped = 0.0, [], 0
    for number, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        tokens = [t for t in range(start, end) if mask[t]]
        share = {
            "dr_grpo": 1 / SEQUENCES / LONGEST,
            "dapo": 1 / TOKENS,
            "ppo": 1 / TOKENS,
            "luspo": 1 / SEQUENCES,
        }.get(algorithm, 1 / SEQUENCES / len(tokens))
        for t in tokens:
            advantage = pack["advantages"][t if algorithm == "ppo" else number].item()
            clipped += ratios[t] < 1 - low or ratios[t] > c
            if ratios[t] > c:
                beyond.append(t)
                saved += share * (ratios[t] - c) * -advantage
    assert 0 < len(beyond) < 24
    assert plain.loss.item() - result.loss.item() == pytest.approx(saved, rel=1e-9)
    assert (before[beyond] != 0).all()
    assert (after[beyond] == 0).all()
    np.testing.assert_array_equal(np.delete(after, beyond), np.delete(before, beyond))
    assert result.metrics["clip_fraction/token"] == pytest.approx(clipped / 24, rel=1e-12)
    assert high < c


def test_dual_clip_keeps_an_infinite_ratio_finite() -> None:
    pack: dict[str, Any] = {
        "log_probs": torch.tensor([-1.0], dtype=torch.float64, requires_grad=True),
        "old_log_probs": torch.tensor([-torch.inf], dtype=torch.float64),
        "advantages": torch.tensor([-2.0], dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, 1]),
        "response_mask": torch.ones(1),
    }
    result = policy_loss("grpo", **pack, dual_clip=3.0)
    assert result.loss.item() == 6.0
    assert torch.autograd.grad(result.loss, pack["log_probs"])[0].item() == 0.0


@pytest.mark.parametrize("algorithm", ["gspo", "grpo", "cispo", "gmpo", "ppo", "minirl", "vespo"])
def test_the_off_policy_mask_drops_what_was_left_with_negative_advantage(algorithm: str) -> None:
    pack = drawn(algorithm)
    sampled, mask = mismatched(pack) + 0.1, pack["response_mask"].tolist()
    far, kept, dropped = [], pack["advantages"].tolist(), 0
    gaps = (sampled - pack["log_probs"]).tolist()
    means = []
    for start, end in itertools.pairwise(BOUNDS):
        own = [gaps[t] for t in range(start, end) if mask[t]]
        means.append(sum(own) / len(own))
    delta = sorted(means)[1] + 1e-3  # two sequences are farther, one of them of positive advantage
    for number, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        far.append(means[number] > delta)
        for t in range(start, end):
            index = t if algorithm == "ppo" else number
            if far[-1] and pack["advantages"][index] < 0:
                kept[index] = 0.0
                dropped += bool(mask[t])
    mine = {**pack, "advantages": torch.tensor(kept, dtype=torch.float64)}
    more = {"clip_low": None, "clip_high": None}
    result, gradient = run(algorithm, pack, off_policy_mask=OffPolicyMask(sampled, delta), **more)
    other, zeroed = run(algorithm, mine, **more)
    assert sum(far) == 2
    assert 0 < dropped < 24
    assert result.loss.item() == other.loss.item()
    np.testing.assert_array_equal(gradient, zeroed)
    assert result.metrics["off_policy_mask/dropped"] == pytest.approx(dropped / 24, rel=1e-12)


def run(algorithm: str, pack: dict[str, torch.Tensor], **more: Any) -> tuple[Any, np.ndarray]:
    log_probs = pack["log_probs"].clone().requires_grad_()
    arguments: dict[str, Any] = {**pack, "log_probs": log_probs, "num_sequences": SEQUENCES, "num_tokens": TOKENS}
    result = policy_loss(algorithm, **(arguments | more))
    return result, torch.autograd.grad(result.loss, log_probs)[0].numpy()


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "cispo", "ppo"])
def test_the_geometric_mask_judges_sequences_and_weighs_tokens(algorithm: str) -> None:
    pack, (low, high) = drawn(algorithm), (0.95, 1.1)
    engine, mask = mismatched(pack), pack["response_mask"].tolist()
    given = pack["old_log_probs"], engine, pack["cu_seqlens"], pack["response_mask"]
    weights, statistics = correct("geo_mask", "token", (low, high), *given)
    d = (pack["old_log_probs"] - engine).tolist()
    by_token, cut = [0.0] * 28, 0
    for start, end in itertools.pairwise(BOUNDS):
        tokens = [t for t in range(start, end) if mask[t]]
        kept = low <= math.exp(sum(d[t] for t in tokens) / len(tokens)) <= high
        cut += 0 if kept else len(tokens)
        for t in tokens:
            by_token[t] = math.exp(d[t]) if kept else 0.0
    assert 0 < cut < 24
    assert max(by_token) > high  # no token's weight is bounded
    assert statistics.to_metrics()["mismatch/weight_cut"] == pytest.approx(cut / 24, rel=1e-12)
    loss, gradient, _ = expected(algorithm, pack, by_token)
    result, mine = found(algorithm, pack, correction=weights)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(mine, gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("name=cispo", "dual_clip=3"), "dual_clip=3 bounds losses made of min and clip, which algorithm.name=cispo"),
        (("name=grpo", "dual_clip=1"), "dual_clip=1.*greater than 1"),
        (("name=grpo", "off_policy_mask=0"), "off_policy_mask=0.*greater than 0"),
        (("name=grpo", "mismatch={correction: geo_mask, level: sequence}"), "geo_mask judges sequences"),
        (("name=gspo", "mismatch={correction: geo_mask}"), "no place for token weights; take correction=mask"),
        (("name=grpo", "kl={coeff: 0.1, estimator: k4}"), "k3_unbiased"),
    ],
)
def test_what_cannot_be_set_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"algorithm.{each}" for each in overrides])


def test_defaults_are_off_and_the_geometric_masks_bounds_nemo_rls() -> None:
    algorithm = load_config(None, ["algorithm.name=grpo", "algorithm.mismatch.correction=geo_mask"]).algorithm
    assert (algorithm.dual_clip, algorithm.off_policy_mask) == (None, None)
    assert algorithm.mismatch.bounds == (0.999, 1.002)
    with pytest.raises(ConfigError, match="dual_clip=3"):
        policy_loss("vespo", **drawn(), dual_clip=3.0)  # type: ignore[arg-type]
