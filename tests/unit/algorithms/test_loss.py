"""The policy losses against golden vectors, closed forms and each other."""

import itertools
import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms import Correction, PolicyLoss, PolicyStatistics, Segments
from gspo_moe.algorithms import policy_loss as unchanged
from gspo_moe.errors import ConfigError, DataError
from tests.losses import CLIPS, policy_loss

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "policy_loss.json").read_text())
FIRST = ("gspo", "gspo_token", "grpo")
LENGTHS = (3, 7, 1, 12, 5)
LONGEST = 15


def float64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_pack(algorithm: str) -> dict[str, torch.Tensor]:
    """Five sequences whose ratios lie on both sides of the clip; ppo's advantages are one a token."""
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)])
    mask = (torch.rand(sum(LENGTHS), generator=generator) < 0.7).double()
    mask[cu_seqlens[1:] - 1] = 1.0
    old = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    noise = torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    shift = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64).repeat_interleave(cu_seqlens.diff())
    count = sum(LENGTHS) if algorithm == "ppo" else len(LENGTHS)
    return {
        "log_probs": old + min(1.5 * CLIPS[algorithm][1], 1.0) * (noise + shift),
        "old_log_probs": old,
        "advantages": torch.randn(count, generator=generator, dtype=torch.float64),
        "cu_seqlens": cu_seqlens,
        "response_mask": mask,
        "router_shift": 1.0 - 0.4 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64),
    }


def part_of(pack: dict[str, torch.Tensor], sequences: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The pack of some of the sequences, and the tokens of the whole pack that it holds."""
    bounds = pack["cu_seqlens"].tolist()
    tokens = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in sequences])
    lengths = [bounds[i + 1] - bounds[i] for i in sequences]
    part = {name: pack[name][tokens] for name in ("log_probs", "old_log_probs", "response_mask", "router_shift")}
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    chosen = tokens if pack["advantages"].shape == pack["log_probs"].shape else list(sequences)
    return {**part, "advantages": pack["advantages"][chosen], "cu_seqlens": cu_seqlens}, tokens


def run(algorithm: str, pack: dict[str, torch.Tensor], **options: Any) -> tuple[PolicyLoss, torch.Tensor]:
    """The result and the gradient to log_probs."""
    low, high = CLIPS[algorithm]
    log_probs = pack["log_probs"].clone().requires_grad_()
    defaults = {"clip_low": low, "clip_high": high, "max_response_tokens": LONGEST}
    arguments: dict[str, Any] = {**defaults, **pack, "log_probs": log_probs, **options}
    result = policy_loss(algorithm, **arguments)
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    return result, gradient


@pytest.mark.parametrize(
    "case", VECTORS, ids=lambda case: f"{case['algorithm']}-{case['clip_low']}-{len(case['advantages'])}"
)
def test_golden_vectors(case: dict[str, Any]) -> None:
    names = ("log_probs", "old_log_probs", "advantages", "response_mask")
    pack = {**{name: float64(case[name]) for name in names}, "cu_seqlens": torch.tensor(case["cu_seqlens"])}
    result, gradient = run(
        case["algorithm"], pack, clip_low=case["clip_low"], clip_high=case["clip_high"], allow_wide_clip=True
    )
    assert result.loss.dtype == torch.float64
    assert result.loss.item() == pytest.approx(case["loss"], rel=0, abs=1e-10)
    np.testing.assert_allclose(gradient, case["grad_log_probs"], rtol=0, atol=1e-10)
    assert result.metrics["loss/policy"] == pytest.approx(case["loss"], rel=0, abs=1e-10)
    assert result.metrics["clip_fraction/sequence"] == pytest.approx(case["clip_fraction_sequence"], rel=0, abs=1e-10)
    assert result.metrics["clip_fraction/token"] == pytest.approx(case["clip_fraction_token"], rel=0, abs=1e-10)


@pytest.mark.parametrize("algorithm", CLIPS)
@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]], [[4, 2], [0, 3], [1]]], ids=str)
def test_any_split_of_a_mini_batch_gives_its_loss_gradient_and_statistics(
    algorithm: str, split: list[list[int]]
) -> None:
    pack = random_pack(algorithm)
    whole, whole_gradient = run(algorithm, pack)
    assert 0 < whole.metrics["clip_fraction/sequence"] < 1
    loss, gradient, parts = 0.0, torch.zeros_like(whole_gradient), list[PolicyStatistics]()
    for sequences in split:
        part, tokens = part_of(pack, sequences)
        result, part_gradient = run(
            algorithm, part, num_sequences=len(LENGTHS), num_tokens=pack["response_mask"].sum().item()
        )
        loss += result.loss.item()
        gradient[tokens] = part_gradient
        parts.append(result.sums)
    assert loss == pytest.approx(whole.loss.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-12, atol=0)
    assert reduce(PolicyStatistics.merge, parts).to_metrics() == pytest.approx(whole.metrics, rel=1e-9)


@pytest.mark.parametrize("algorithm", FIRST)
def test_equal_policies_give_ratio_one_and_the_policy_gradient(algorithm: str) -> None:
    pack = random_pack(algorithm)
    result, gradient = run(algorithm, {**pack, "log_probs": pack["old_log_probs"]})
    assert result.loss.item() == pytest.approx(-pack["advantages"].mean().item(), rel=1e-14)
    metrics = result.metrics
    for level in ("token", "sequence"):
        assert [metrics[f"ratio/{level}_{figure}"] for figure in ("mean", "std", "min", "max")] == [1.0, 0.0, 1.0, 1.0]
        assert metrics[f"clip_fraction/{level}"] == 0.0
    assert metrics["kl/old_k3"] == 0.0
    start = 0
    for advantage, length in zip(pack["advantages"], LENGTHS, strict=True):
        mask = pack["response_mask"][start : start + length]
        expected = -advantage * mask / mask.sum() / len(LENGTHS)
        np.testing.assert_allclose(gradient[start : start + length], expected, rtol=1e-14)
        start += length


@pytest.mark.parametrize("algorithm", CLIPS)
def test_ratio_and_kl_metrics_match_numpy(algorithm: str) -> None:
    pack = random_pack(algorithm)
    metrics = run(algorithm, pack)[0].metrics
    d, mask = (pack["log_probs"] - pack["old_log_probs"]).numpy(), pack["response_mask"].numpy() == 1
    bounds = pack["cu_seqlens"].tolist()
    token = np.exp(d[mask])
    sequence = np.exp([d[a:b][mask[a:b]].mean() for a, b in itertools.pairwise(bounds)])
    expected = {"kl/old_k3": (np.exp(d[mask]) - 1 - d[mask]).mean()}
    for level, ratio in (("token", token), ("sequence", sequence)):
        figures = {"mean": ratio.mean(), "std": ratio.std(), "min": ratio.min(), "max": ratio.max()}
        expected |= {f"ratio/{level}_{figure}": value for figure, value in figures.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-8)


# Sequence 0 (A > 0): tokens above, inside and below the clip, mean above. Sequence 1 (A < 0): both tokens below, then
# one masked. Sequence 2 (A = 0): far above, never clipped.
CLIP_PACK = {
    "log_probs": float64([0.9, 0.0, -0.3, -0.4, -0.4, 5.0, 1.0]),
    "old_log_probs": torch.zeros(7, dtype=torch.float64),
    "advantages": float64([1.0, -1.0, 0.0]),
    "cu_seqlens": torch.tensor([0, 3, 6, 7]),
    "response_mask": float64([1, 1, 1, 1, 1, 0, 1]),
}


@pytest.mark.parametrize(
    ("algorithm", "loss", "sequence", "token"),
    [
        # exp(0.2) < 1.27: only sequence 1 is clipped, with its 2 of the 6 response tokens.
        ("gspo", -(np.exp(0.2) - 0.8) / 3, 1 / 3, 2 / 6),
        ("gspo_token", -(np.exp(0.2) - 0.8) / 3, 1 / 3, 2 / 6),
        # Token 0 of sequence 0 and both of sequence 1; token 2 is below the clip, but its A > 0.
        ("grpo", -((1.27 + 1 + np.exp(-0.3)) / 3 - 0.8) / 3, 2 / 3, 3 / 6),
    ],
)
def test_clip_fractions_by_hand(algorithm: str, loss: float, sequence: float, token: float) -> None:
    metrics = run(algorithm, CLIP_PACK, clip_low=0.2, clip_high=0.27, allow_wide_clip=True)[0].metrics
    assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-14)
    assert metrics["clip_fraction/sequence"] == pytest.approx(sequence, rel=1e-14)
    assert metrics["clip_fraction/token"] == pytest.approx(token, rel=1e-14)


@pytest.mark.parametrize("algorithm", CLIPS)
def test_values_off_the_response_have_no_effect(algorithm: str) -> None:
    pack = random_pack(algorithm)
    expected, expected_gradient = run(algorithm, pack)
    off = pack["response_mask"] == 0
    noisy = {**pack, "log_probs": pack["log_probs"].masked_fill(off, torch.nan)}
    noisy["old_log_probs"] = pack["old_log_probs"].masked_fill(off, -torch.inf)
    noisy["router_shift"] = pack["router_shift"].masked_fill(off, torch.nan)
    if algorithm == "ppo":
        noisy["advantages"] = pack["advantages"].masked_fill(off, torch.nan)
    result, gradient = run(algorithm, noisy)
    assert result.metrics == expected.metrics
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("algorithm", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_takes_the_dtype_of_the_log_probs(algorithm: str, dtype: torch.dtype) -> None:
    pack = random_pack(algorithm)
    low = {**pack, "log_probs": pack["log_probs"].to(dtype), "old_log_probs": pack["old_log_probs"].to(dtype)}
    exact = {**low, "log_probs": low["log_probs"].double(), "old_log_probs": low["old_log_probs"].double()}
    (result, gradient), (expected, expected_gradient) = run(algorithm, low), run(algorithm, exact)
    assert result.loss.dtype == gradient.dtype == dtype
    assert result.loss.item() == expected.loss.to(dtype).item()
    assert torch.equal(gradient, expected_gradient.to(dtype))
    assert result.metrics == expected.metrics


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
@pytest.mark.parametrize("clips", [(0.2, 3e-4), (3e-4, 0.01)])
def test_wide_clips_are_refused_unless_allowed(algorithm: str, clips: tuple[float, float]) -> None:
    pack, options = random_pack(algorithm), {"clip_low": clips[0], "clip_high": clips[1]}
    with pytest.raises(ConfigError, match=r"allow_wide_clip"):
        run(algorithm, pack, **options)
    run(algorithm, pack, **options, allow_wide_clip=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"algorithm": "gspo-tokn"}, ConfigError, "did you mean 'gspo_token'"),
        ({"clip_low": -1e-4}, ConfigError, "must be 0 or more"),
        ({"clip_high": float("nan")}, ConfigError, "must be 0 or more"),
        ({"response_mask": float64([1, 1, 1, 0, 0, 0, 1])}, DataError, "sequence 1 of the pack has no response token"),
        ({"cu_seqlens": torch.tensor([0, 3, 3, 7])}, DataError, "sequence 1 of the pack has no response token"),
        ({"response_mask": float64([1, 1, 0.5, 1, 1, 0, 1])}, DataError, "other than 0 and 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, DataError, "rise from 0 to the pack's 7 tokens"),
        ({"cu_seqlens": torch.tensor([0, 3, 6, 8])}, DataError, "rise from 0 to the pack's 7 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6, 3, 7])}, DataError, "rise from 0 to the pack's 7 tokens"),
        ({"cu_seqlens": torch.tensor([1, 3, 6, 7])}, DataError, "rise from 0 to the pack's 7 tokens"),
        ({"cu_seqlens": torch.tensor([0])}, DataError, "N >= 1"),
        ({"old_log_probs": torch.zeros(6)}, DataError, r"\[7\] and old log_probs \[6\]"),
        ({"advantages": torch.zeros(7)}, DataError, r"\[N\] = \[3\], got \[7\]"),
        (
            {"algorithm": "gspo_token", "advantages": torch.zeros(4)},
            DataError,
            r"\[N\] = \[3\] or \[T\] = \[7\], got \[4\]",
        ),
        ({"algorithm": "ppo", "clip_low": 0.2, "advantages": torch.zeros(3)}, DataError, r"\[T\] = \[7\], got \[3\]"),
        ({"num_sequences": 2}, DataError, "num_sequences=2 is not a count of at least the pack's own 3"),
        *(
            ({**counts, **dapo}, DataError, "num_tokens=.* is not a count of at least the pack's own 6")
            for dapo in ({"algorithm": "dapo", "clip_low": 0.2},)
            for counts in (
                {"num_sequences": 3, "num_tokens": 5},
                {"num_tokens": float("nan")},
                {"num_tokens": float("inf")},
                {"num_tokens": -6.0},
            )
        ),
        *(
            ({"algorithm": name, "clip_low": 0.2, "num_sequences": 9, **advantages}, ConfigError, "pass num_tokens too")
            for name, advantages in (("dapo", {}), ("cispo", {}), ("ppo", {"advantages": torch.ones(7)}))
        ),
        ({"num_tokens": 90}, ConfigError, "pass num_sequences too"),
        ({"advantages": float64([1, float("nan"), 0])}, DataError, "advantage 1 is nan"),
        ({"advantages": float64([1, 0, float("-inf")])}, DataError, "advantage 2 is -inf"),
        ({"algorithm": "gmpo", "clip_low": 1.0, "clip_high": 0.4}, ConfigError, "clip_low below 1"),
        ({"algorithm": "grpo"}, ConfigError, "made for a sequence ratio"),
        ({"algorithm": "dr_grpo", "clip_low": 0.2}, ConfigError, "pass the length limit"),
        ({"algorithm": "rspo", "clip_low": 0.2}, ConfigError, "router_shift"),
        (
            {"algorithm": "rspo", "clip_low": 0.2, "router_shift": torch.ones(3)},
            DataError,
            r"\[3\] values for a pack of \[7\]",
        ),
        ({"correction": Correction("token", torch.ones(7))}, ConfigError, "no place for token weights"),
        (
            {
                "algorithm": "vespo",
                "clip_low": None,
                "clip_high": None,
                "correction": Correction("token", torch.ones(7)),
            },
            ConfigError,
            "pass the engine's log-probs as old ones",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"algorithm": "gspo", **CLIP_PACK, "clip_low": 3e-4, "clip_high": 4e-4, **change}
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


def test_the_defaults_are_the_papers_clips_and_the_packs_counts() -> None:
    pack = random_pack("gspo")
    segments = Segments.of_pack(pack["cu_seqlens"], pack["response_mask"])
    found = unchanged("gspo", pack["log_probs"], pack["old_log_probs"], pack["advantages"], segments)
    assert found.metrics.items() <= run("gspo", pack)[0].metrics.items()


def test_entropy_is_logged_as_its_mean_over_response_tokens() -> None:
    pack = random_pack("grpo")
    entropy_T = torch.arange(sum(LENGTHS), dtype=torch.float32)
    mask = pack["response_mask"] == 1
    noisy_T = entropy_T.masked_fill(~mask, torch.nan)
    metrics = run("grpo", pack, entropy=noisy_T)[0].metrics
    assert metrics["policy/entropy"] == pytest.approx(entropy_T[mask].double().mean().item(), rel=1e-14)
    assert "policy/entropy" not in run("grpo", pack)[0].metrics


CLIPPED = ("gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "ppo")


def overflowing(algorithm: str, advantages: Sequence[float], far: float = -801.0) -> tuple[PolicyLoss, torch.Tensor]:
    """A sequence of one token an advantage, of which the first one's log-ratio is -1 - far and the others' are 0."""
    count = len(advantages)
    pack = {
        "log_probs": float64([-1.0] * count),
        "old_log_probs": float64([far] + [-1.0] * (count - 1)),
        "advantages": float64(advantages),
        "cu_seqlens": torch.arange(count + 1),
        "response_mask": torch.ones(count),
        "router_shift": torch.ones(count, dtype=torch.float64),
    }
    return run(algorithm, pack, max_response_tokens=1)


@pytest.mark.parametrize("far", [-801.0, -torch.inf])
@pytest.mark.parametrize("algorithm", [*CLIPPED, "luspo", "cispo", "gmpo", "rspo"])
def test_ratios_beyond_float64_leave_no_nan(algorithm: str, far: float) -> None:
    bound = 1.0 + CLIPS[algorithm][1]
    # A > 0: the clip, without gradient; cispo's weight is cut alike, and multiplies log pi = -1, with gradient.
    result, gradient = overflowing(algorithm, [1.0, 0.5], far)
    first, slope = (-bound, -bound) if algorithm == "cispo" else (bound, 0.0)
    other, other_slope = (-0.5, -0.5) if algorithm == "cispo" else (0.5, -0.5)
    assert result.loss.item() == pytest.approx(-(first + other) / 2, rel=1e-12)
    assert gradient.tolist() == pytest.approx([slope / 2, other_slope / 2], rel=1e-12)
    metrics = result.metrics
    assert [metrics[f"ratio/{level}_{name}"] for level in ("token", "sequence") for name in ("mean", "std", "max")] == (
        [torch.inf] * 6
    )
    assert metrics["kl/old_k3"] == torch.inf
    assert metrics["clip_fraction/token"] == 0.5
    # A = 0: nothing.
    result, gradient = overflowing(algorithm, [0.0, 0.5], far)
    assert result.loss.item() == pytest.approx(-other / 2, rel=1e-12)
    assert gradient.tolist() == pytest.approx([0.0, other_slope / 2], rel=1e-12)
    # A < 0: no bound, so infinity, but for cispo.
    result, gradient = overflowing(algorithm, [-1.0, 0.5], far)
    if algorithm == "cispo":
        assert result.loss.item() == pytest.approx((-bound + 0.5) / 2, rel=1e-12)
    else:
        assert result.loss.item() == torch.inf
        assert result.metrics["loss/policy"] == torch.inf
        assert gradient[1].item() == pytest.approx(-0.25, rel=1e-12)
        if far > -torch.inf:
            assert gradient[0].item() == torch.inf
    assert not gradient.isnan().any()


def test_a_ratio_that_nothing_bounds_keeps_its_size() -> None:
    for algorithm in CLIPPED:
        result, gradient = overflowing(algorithm, [-1.0], far=-501.0)
        assert result.loss.item() == pytest.approx(np.exp(500.0), rel=1e-12)
        assert gradient.item() == pytest.approx(np.exp(500.0), rel=1e-12)
