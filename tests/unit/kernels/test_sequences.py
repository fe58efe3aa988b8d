"""sequence_reduce against the policy loss in float64, of which it is the fused form for gspo and gspo_token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from gspo_moe.errors import KernelError
from gspo_moe.kernels import ops, reference, sequence_reduce
from tests.losses import policy_loss

CLIPS: dict[str, Any] = {"clip_low": 3e-3, "clip_high": 4e-3}
# Ragged, of one token and of many.
LENGTHS = (1, 2, 7, 31, 64, 3, 300)


def drawn(lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(tokens, generator=generator) < 0.7
    mask[bounds[1:][torch.tensor(lengths) > 0] - 1] = True
    old = -3 * torch.rand(tokens, generator=generator)
    log_probs = old + 0.02 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return {"log_probs": log_probs, "old": old, "mask": mask, "bounds": bounds, "advantages": advantages}


def fused(data: dict[str, torch.Tensor], log_probs: torch.Tensor, advantages: torch.Tensor, **options: Any) -> Any:
    return sequence_reduce(
        log_probs,
        data["old"],
        data["mask"],
        data["bounds"],
        advantages,
        scale=1 / 20,
        clips=tuple(CLIPS.values()),
        **options,
    )


@pytest.mark.parametrize(("algorithm", "per_token"), [("gspo", False), ("gspo_token", False), ("gspo_token", True)])
def test_loss_clipping_and_gradient_are_those_of_the_policy_loss(algorithm: str, per_token: bool) -> None:
    data = drawn()
    advantages = data["advantages"]
    if per_token:
        advantages = torch.randn(len(data["mask"]), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    exact = data["log_probs"].double().requires_grad_()
    expected = policy_loss(
        algorithm, exact, data["old"].double(), advantages, data["bounds"], data["mask"], num_sequences=20, **CLIPS
    )
    expected.loss.backward()
    log_probs = data["log_probs"].clone().requires_grad_()
    with torch.no_grad():
        log_probs[~data["mask"]] = torch.nan
    found = fused(data, log_probs, advantages)
    found.loss.sum().backward()
    assert found.loss.dtype == torch.float64
    assert 0 < expected.metrics["clip_fraction/token"] < 1
    torch.testing.assert_close(found.loss.sum(), expected.loss, atol=1e-12, rtol=1e-12)
    assert found.clipped_tokens.sum() == expected.sums.sums["clipped_tokens"]
    assert log_probs.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(log_probs.grad.double(), exact.grad, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_kernel_is_its_reference_with_empty_sequences_and_tokens_behind_the_last(per_token: bool) -> None:
    data = drawn((0, 3, 0, 5, 0))
    data["mask"][3:8] = torch.tensor([False] * 5)
    data["bounds"][-1] = data["bounds"][-2] = 7
    advantages = torch.randn(8, dtype=torch.float64) if per_token else data["advantages"]
    arguments = (data["log_probs"], data["old"], data["mask"], data["bounds"], advantages, per_token)
    for sums in (None, ops.sequence_sums(*arguments[:4])):
        found = ops.sequence_reduce(*arguments, sums, 3e-3, 4e-3, 0.1)
        expected = reference.sequence_reduce(*arguments, sums, 3e-3, 4e-3, 0.1)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(ops.sequence_sums(*arguments[:4]), reference.sequence_sums(*arguments[:4]))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("reduce", [ops.sequence_reduce, reference.sequence_reduce], ids=["kernel", "reference"])
def test_ratios_beyond_float64_leave_no_nan(reduce: Any, per_token: bool) -> None:
    """One token a sequence and one off the response; A > 0 takes the clip, A = 0 nothing, A < 0 infinity."""
    lengths, by_sequence = torch.tensor([1, 2, 1]), torch.tensor([1.0, 0.0, -1.0]).double()
    bounds, mask = torch.tensor([0, *lengths.cumsum(0)]), torch.tensor([True, True, False, True])
    advantages = by_sequence.repeat_interleave(lengths) if per_token else by_sequence
    far = torch.full((4,), -801.0)
    loss, ratio, clipped, grad = reduce(far + 800, far, mask, bounds, advantages, per_token, None, 3e-3, 4e-3, 0.5)
    assert loss.tolist() == [pytest.approx(-0.5 * 1.004, rel=1e-12), 0.0, torch.inf]
    assert ratio.tolist() == [torch.inf] * 3
    assert clipped.tolist() == [1, 0, 0]
    assert grad.tolist() == [0.0, 0.0, 0.0, torch.inf]


def test_each_sequences_gradient_is_scaled_by_its_own() -> None:
    data, scales = drawn(), torch.arange(1.0, 8.0, dtype=torch.float64)
    log_probs = data["log_probs"].clone().requires_grad_()
    (whole,) = torch.autograd.grad(fused(data, log_probs, data["advantages"]).loss.sum(), log_probs)
    (scaled,) = torch.autograd.grad((fused(data, log_probs, data["advantages"]).loss * scales).sum(), log_probs)
    torch.testing.assert_close(scaled, whole * scales.float().repeat_interleave(torch.tensor(LENGTHS)))


def test_parts_of_sequences_add_up_to_the_whole() -> None:
    """Two ranks' tokens, the even and the odd ones; each finds the whole loss and its own tokens' gradient."""
    data = drawn((2, 8, 30))
    log_probs = data["log_probs"].clone().requires_grad_()
    whole = fused(data, log_probs, data["advantages"])
    (gradient,) = torch.autograd.grad(whole.loss.sum(), log_probs)
    parts = []
    for rank in range(2):
        part = {name: data[name][rank::2].clone() for name in ("log_probs", "old", "mask")}
        parts.append(part | {"bounds": data["bounds"] // 2, "advantages": data["advantages"]})
    sums = sum(ops.sequence_sums(p["log_probs"], p["old"], p["mask"], p["bounds"]) for p in parts)
    for rank, part in enumerate(parts):
        mine = part["log_probs"].clone().requires_grad_()
        found = fused(part, mine, part["advantages"], sum_over_context=lambda _: sums)
        torch.testing.assert_close(found.loss, whole.loss, atol=1e-14, rtol=1e-12)
        (own,) = torch.autograd.grad(found.loss.sum(), mine)
        torch.testing.assert_close(own, gradient[rank::2], atol=1e-12, rtol=1e-6)


def test_wrong_arguments_say_what_fits() -> None:
    data = drawn()
    for name, value, message in (
        ("mask", data["mask"].int(), "bool mask"),
        ("old", data["old"][1:], "must have the shape"),
        ("bounds", data["bounds"].int(), "cu_seqlens must be int64"),
        ("bounds", data["bounds"] + 1, "must rise from 0"),
    ):
        with pytest.raises(KernelError, match=message):
            fused(data | {name: value}, data["log_probs"], data["advantages"])
    with pytest.raises(KernelError, match="one a sequence"):
        fused(data, data["log_probs"], data["advantages"][1:])


def test_the_ops_keep_torchs_rules() -> None:
    data = drawn((3, 4))
    arguments = (data["log_probs"], data["old"], data["mask"], data["bounds"])
    opcheck(ops.sequence_sums, arguments)
    arguments = (arguments[0].requires_grad_(), *arguments[1:])
    opcheck(ops.sequence_reduce, (*arguments, data["advantages"], False, None, 3e-3, 4e-3, 0.1))
