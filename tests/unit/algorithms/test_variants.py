"""grpo's and gspo's kin, corrections and the KL to a reference against formulas written as plain loops.

The reference is Python floats and closed-form gradients; it shares no code with the project.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms import Correction, KLPenalty
from tests.losses import CLIPS, WHOLE_SEQUENCES, correct, policy_loss

BOUNDS = [0, 6, 7, 16, 28]
LONGEST = 12
SEQUENCES, TOKENS = 9, 50.0  # of a mini-batch of which this pack is a part
VARIANTS = ("grpo", "dr_grpo", "dapo", "cispo", "gmpo", "rspo", "ppo")


def drawn(algorithm: str = "") -> dict[str, torch.Tensor]:
    """Ratios on both sides of every clip, some tokens no response; advantages one a sequence, but for ppo."""
    generator = torch.Generator().manual_seed(5)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    mask = torch.ones(28, dtype=torch.float64)
    mask[[0, 1, 9, 20]] = 0
    old = -normal(28).abs() - 0.1
    pack = {
        "log_probs": old + 0.8 * normal(28),
        "old_log_probs": old,
        "advantages": torch.tensor([1.2, -0.7, -1.1, 0.9], dtype=torch.float64),
        "cu_seqlens": torch.tensor(BOUNDS),
        "response_mask": mask,
        "router_shift": torch.rand(28, generator=generator, dtype=torch.float64) * 0.5 + 0.5,
    }
    return pack | ({"advantages": normal(28)} if algorithm == "ppo" else {})


def found(algorithm: str, pack: dict[str, torch.Tensor], **more: Any) -> tuple[Any, np.ndarray]:
    log_probs = pack["log_probs"].clone().requires_grad_()
    low, high = CLIPS[algorithm]
    sizes = {"num_sequences": SEQUENCES, "num_tokens": TOKENS, "max_response_tokens": LONGEST}
    arguments: dict[str, Any] = {**pack, "log_probs": log_probs, "clip_low": low, "clip_high": high, **sizes, **more}
    result = policy_loss(algorithm, **arguments)
    result.loss.backward()
    assert log_probs.grad is not None
    return result, log_probs.grad.numpy()


def expected(algorithm: str, pack: dict[str, torch.Tensor], weight: list[float]) -> tuple[float, list[float], int]:
    """Loss, gradient and number of clipped tokens; weight: what multiplies each token's term."""
    low, high = CLIPS[algorithm]
    p, q, mask, shift = (
        pack[name].tolist() for name in ("log_probs", "old_log_probs", "response_mask", "router_shift")
    )
    loss, gradient, clipped = 0.0, [0.0] * 28, 0
    for number, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        tokens = [t for t in range(start, end) if mask[t]]
        advantage = pack["advantages"][number].item()
        if algorithm in ("gmpo", "rspo"):
            sign, total, inside = math.copysign(1.0, advantage), 0.0, []
            for t in tokens:
                ratio = math.exp(p[t] - q[t])
                if algorithm == "rspo":
                    ratio *= max(shift[t], 0.8)
                bounded = min(ratio**sign, min(max(ratio, 1 - low), 1 + high) ** sign) ** sign
                total += math.log(bounded)
                if bounded == pytest.approx(ratio, rel=1e-12):
                    inside.append(t)
            value = advantage * math.exp(total / len(tokens))
            loss -= weight[start] * value / SEQUENCES
            clipped += len(tokens) - len(inside)
            for t in inside:
                gradient[t] -= weight[start] * value / len(tokens) / SEQUENCES
            continue
        for t in tokens:
            if algorithm == "ppo":
                advantage = pack["advantages"][t].item()
            ratio = math.exp(p[t] - q[t])
            bounded = min(max(ratio, 1 - low), 1 + high)
            share = {
                "grpo": 1 / SEQUENCES / len(tokens),
                "dr_grpo": 1 / SEQUENCES / LONGEST,
                "dapo": 1 / TOKENS,
                "cispo": 1 / TOKENS,
                "ppo": 1 / TOKENS,
            }[algorithm] * weight[t]
            if algorithm == "cispo":
                loss -= share * bounded * advantage * p[t]
                gradient[t] -= share * bounded * advantage
                clipped += bounded != ratio
            else:
                loss -= share * min(ratio * advantage, bounded * advantage)
                if bounded * advantage < ratio * advantage:
                    clipped += 1
                else:
                    gradient[t] -= share * ratio * advantage
    return loss, gradient, clipped


def same(result: Any, gradient: np.ndarray, loss: float, other: list[float]) -> None:
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient, other, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("algorithm", VARIANTS)
def test_loss_gradient_and_clip_fraction_are_the_papers(algorithm: str) -> None:
    pack = drawn(algorithm)
    if algorithm == "cispo":
        pack["log_probs"][3] = pack["old_log_probs"][3] + 2.0  # a ratio above 5
    loss, gradient, clipped = expected(algorithm, pack, [1.0] * 28)
    result, mine = found(algorithm, pack)
    same(result, mine, loss, gradient)
    assert 0 < clipped < 24
    assert result.metrics["clip_fraction/token"] == pytest.approx(clipped / 24, rel=1e-12)


def test_rspo_without_router_shift_is_gmpo() -> None:
    pack = drawn()
    pack["router_shift"] = torch.ones(28, dtype=torch.float64)
    (rspo, first), (gmpo, second) = found("rspo", pack), found("gmpo", pack)
    assert rspo.loss.item() == gmpo.loss.item()
    np.testing.assert_array_equal(first, second)


ROLLOUT_SHIFT = 0.6


def mismatched(pack: dict[str, torch.Tensor]) -> torch.Tensor:
    """The engine's log-probs of the same tokens, some way off."""
    noise = torch.randn(28, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return pack["old_log_probs"] - ROLLOUT_SHIFT * noise


@pytest.mark.parametrize(("kind", "bounds"), [("tis", (0.0, 1.3)), ("mask", (0.7, 1.3))])
@pytest.mark.parametrize(
    ("algorithm", "level"),
    [(name, level) for name in VARIANTS for level in ("token", "sequence")[name in WHOLE_SEQUENCES :]],
)
def test_corrections_weigh_tokens_or_sequences(
    algorithm: str, level: str, kind: str, bounds: tuple[float, float]
) -> None:
    pack = drawn(algorithm)
    engine = mismatched(pack)
    # By sequence the noise nearly averages out, so the bounds are nearer.
    low, high = bounds if level == "token" else (0.95, 1.1)
    weights, statistics = correct(
        kind, level, (low, high), pack["old_log_probs"], engine, pack["cu_seqlens"], pack["response_mask"]
    )
    d, mask = (pack["old_log_probs"] - engine).tolist(), pack["response_mask"].tolist()
    token_weight, cut, units = [1.0] * 28, 0, 0
    for start, end in itertools.pairwise(BOUNDS):
        tokens = [t for t in range(start, end) if mask[t]]
        mean = math.exp(sum(d[t] for t in tokens) / len(tokens))
        for t in range(start, end):
            ratio = math.exp(d[t]) if level == "token" else mean
            outside = ratio > high or (kind == "mask" and ratio < low)
            token_weight[t] = ratio if not outside else high if kind == "tis" else 0.0
            if (t in tokens) if level == "token" else (t == tokens[0]):
                cut, units = cut + outside, units + 1
    assert 0 < cut < units
    metrics = statistics.to_metrics()
    assert metrics["mismatch/weight_cut"] == pytest.approx(cut / units, rel=1e-12)
    firsts = [next(t for t in range(a, b) if mask[t]) for a, b in itertools.pairwise(BOUNDS)]
    counted = [t for t in range(28) if mask[t]] if level == "token" else firsts
    mean_weight = sum(token_weight[t] for t in counted) / units
    assert metrics["mismatch/weight_mean"] == pytest.approx(mean_weight, rel=1e-12)
    loss, gradient, _ = expected(algorithm, pack, token_weight)
    result, mine = found(algorithm, pack, correction=weights)
    same(result, mine, loss, gradient)


def test_gspo_is_corrected_by_sequence() -> None:
    pack, wide = drawn(), {"clip_low": 0.9, "clip_high": 9.0, "allow_wide_clip": True}
    weights = torch.tensor([0.5, 0.0, 1.0, 1.25], dtype=torch.float64)
    _, plain = found("gspo", pack, **wide)
    _, mine = found("gspo", pack, **wide, correction=Correction("sequence", weights))
    for weight, (start, end) in zip(weights.tolist(), itertools.pairwise(BOUNDS), strict=True):
        assert plain[start:end].any()
        np.testing.assert_allclose(mine[start:end], weight * plain[start:end], rtol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased"])
@pytest.mark.parametrize("algorithm", ["gspo", "grpo", "dr_grpo", "cispo"])
def test_kl_to_a_reference(algorithm: str, estimator: str) -> None:
    pack = drawn()
    reference = pack["log_probs"] + 0.3 * torch.randn(
        28, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    coeff = 0.04
    plain, gradient = found(algorithm, pack)
    result, mine = found(algorithm, pack, kl=KLPenalty(reference, coeff, estimator))
    r, mask = (pack["log_probs"] - reference).tolist(), pack["response_mask"].tolist()
    penalty, slopes, mean = 0.0, [0.0] * 28, 0.0
    for start, end in itertools.pairwise(BOUNDS):
        tokens = [t for t in range(start, end) if mask[t]]
        share = {"dr_grpo": 1 / SEQUENCES / LONGEST, "cispo": 1 / TOKENS}.get(algorithm, 1 / SEQUENCES / len(tokens))
        for t in tokens:
            k3, w = math.exp(-r[t]) - 1 + r[t], math.exp(pack["log_probs"][t] - pack["old_log_probs"][t])
            value = {"k1": r[t], "k2": r[t] ** 2 / 2, "k3": k3, "k3_unbiased": w * k3}[estimator]
            slope = {"k3": 1 - math.exp(-r[t]), "k3_unbiased": w * (k3 + 1 - math.exp(-r[t]))}.get(estimator, r[t])
            penalty += coeff * share * value
            slopes[t] = coeff * share * slope
            mean += value / 24
    assert result.loss.item() - plain.loss.item() == pytest.approx(penalty, rel=1e-9)
    np.testing.assert_allclose(mine - gradient, slopes, rtol=1e-9, atol=1e-15)
    assert result.metrics["kl/reference"] == pytest.approx(mean, rel=1e-12)
    assert result.metrics["loss/kl"] == pytest.approx(penalty * SEQUENCES / 4, rel=1e-12)
    assert result.metrics["loss/policy"] == plain.metrics["loss/policy"]
