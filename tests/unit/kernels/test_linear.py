"""linear_token_log_probs against a float64 log-softmax of the whole logits; several ranks are in tests/distributed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.library import opcheck

from gspo_moe.errors import KernelError
from gspo_moe.kernels import VocabShard, linear_token_log_probs
from gspo_moe.kernels.blocks import block_columns
from gspo_moe.kernels.linear import _linear_token_log_probs

ROWS, TOKENS, HIDDEN, COLUMNS, WORDS = 23, 19, 16, 131, 120
# From one column at a time, over blocks of which some are kept, to all at once.
BUDGETS = (1, 5000, 9000, 2**20)


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(COLUMNS, HIDDEN, generator=generator, dtype=torch.float64) / 2
    targets = torch.randint(WORDS, (TOKENS,), generator=generator)
    weights = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_values_and_gradients_do_not_depend_on_the_blocks(dtype: torch.dtype, error: float, budget: int) -> None:
    hidden, weight, targets, weights = drawn(dtype)
    exact, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = exact[:TOKENS] @ exact_weight[:WORDS].T
    expected = torch.log_softmax(logits / 0.7, dim=1).gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    options: dict[str, Any] = {"temperature": 0.7, "shard": VocabShard(vocab=WORDS), "memory_budget": budget}
    found = linear_token_log_probs(hidden, weight, targets, **options)
    torch.testing.assert_close(found.log_probs.double(), expected, atol=2 * error, rtol=error)
    if dtype != torch.bfloat16:
        assert torch.equal(found.first_choice, logits.argmax(dim=1) == targets)
    assert exact.grad is not None
    assert exact_weight.grad is not None
    (found.log_probs * weights).sum().backward(retain_graph=True)
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=2 * error, rtol=error)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=2 * error, rtol=error)
    assert (hidden.grad[TOKENS:] == 0).all()
    assert (weight.grad[WORDS:] == 0).all()
    with pytest.raises(KernelError, match="ran twice"):
        found.log_probs.sum().backward()

    weight.grad, weight.main_grad = None, torch.ones(weight.shape, dtype=torch.promote_types(dtype, torch.float32))  # type: ignore[attr-defined]
    found = linear_token_log_probs(hidden, weight, targets, into_main_grad=True, **options)
    (found.log_probs * weights).sum().backward()
    assert weight.grad is None
    main_grad: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(main_grad.double() - 1, exact_weight.grad, atol=2 * error, rtol=error)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_comes_of_the_same_pass_and_changes_nothing_else(
    temperature: float, dtype: torch.dtype, error: float, budget: int
) -> None:
    hidden, weight, targets, weights = drawn(dtype)
    logits = hidden[:TOKENS].detach().double() @ weight[:WORDS].detach().double().T
    log_p = torch.log_softmax(logits / temperature, dim=1)
    options: dict[str, Any] = {"temperature": temperature, "shard": VocabShard(vocab=WORDS), "memory_budget": budget}
    found, without = (
        linear_token_log_probs(hidden, weight, targets, entropy=asked, **options) for asked in (True, False)
    )
    assert found.entropy is not None
    assert without.entropy is None
    assert not found.entropy.requires_grad
    torch.testing.assert_close(found.entropy.double(), -(log_p.exp() * log_p).sum(dim=1), atol=2 * error, rtol=error)
    gradients = [torch.autograd.grad((each.log_probs * weights).sum(), (hidden, weight)) for each in (found, without)]
    assert torch.equal(found.log_probs, without.log_probs)
    assert all(map(torch.equal, *gradients))


def test_a_word_without_probability_adds_nothing_to_the_entropy() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [0.0], [-torch.inf], [-torch.inf]])
    for budget in BUDGETS:
        found = linear_token_log_probs(hidden, weight, torch.tensor([0]), entropy=True, memory_budget=budget)
        assert found.entropy is not None
        assert found.entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def test_bf16_gradients_are_summed_in_float32() -> None:
    """512 equal tokens: a bf16 sum stops growing at 256 times the first summand."""
    hidden, weight = torch.full((512, 1), 2.0**-4).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64)
    linear_token_log_probs(hidden, weight, targets, memory_budget=1).log_probs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [16.0, -16.0]


def test_blocks_fit_the_budget() -> None:
    assert block_columns(100, 8, 0, 800) == (6, 100)
    assert block_columns(100, 8, 0, 10**6) == (100, 100)
    assert block_columns(0, 8, 4, 800) == (1, 0)
    assert block_columns(100, 8, 4, 1) == (1, 0)
    for product_bytes, budget, wide in itertools.product((0, 4, 80), range(88, 1000, 24), (1, 10)):
        block, kept = block_columns(100, 8, product_bytes, budget, wide)
        buffered = 0 if kept == 100 else block
        assert kept == 100 or kept % block == 0
        assert (buffered + kept) * 8 + block * product_bytes <= budget
    assert block_columns(100, 8, 0, 400, wide=10) == (10, 40)
    assert block_columns(100, 8, 0, 400, wide=90) == (12, 36)
    assert block_columns(100, 8, 8, 400) == (1, 48)
    assert block_columns(200_000, 8, 0, 1_280_000, wide=4096) == (9984, 149_760)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets, _ = drawn(torch.float32)
    (grad,) = torch.autograd.grad(linear_token_log_probs(hidden, weight.detach(), targets).log_probs.sum(), hidden)
    linear_token_log_probs(hidden, weight, targets).log_probs.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(grad, hidden.grad)
    assert not linear_token_log_probs(hidden.detach(), weight.detach(), targets).log_probs.requires_grad


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [[1, 2, 7, 18, ROWS - 1], []])
def test_tokens_at_positions_are_rows_of_their_own(positions: list[int], dtype: torch.dtype, budget: int) -> None:
    hidden, weight, targets, weights = drawn(dtype)
    chosen = torch.tensor(positions, dtype=torch.int64)
    targets, weights = targets[: len(chosen)], weights[: len(chosen)]
    gradients = []
    for rows, at in ((hidden[chosen], None), (hidden, chosen)):
        found = linear_token_log_probs(rows, weight, targets, positions=at, memory_budget=budget, entropy=True)
        of_hidden, of_weight = torch.autograd.grad((found.log_probs * weights).sum(), (hidden, weight))
        assert found.entropy is not None
        gradients.append((found.log_probs, found.entropy, found.first_choice, of_hidden, of_weight))
    assert all(map(torch.equal, *gradients))


def test_no_token_is_no_log_prob_and_no_gradient() -> None:
    hidden, weight, targets, _ = drawn(torch.float32)
    found = linear_token_log_probs(hidden, weight, targets[:0])
    assert found.log_probs.shape == (0,)
    found.log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_wrong_arguments_say_what_fits() -> None:
    hidden, weight, targets, _ = drawn(torch.float32)
    for arguments, options, message in (
        ((hidden, weight.bfloat16(), targets), {}, "one dtype"),
        ((hidden[:, :5], weight, targets), {}, "one dtype"),
        ((hidden[:5], weight, targets), {}, r"\[19\] targets do not fit 5 rows"),
        ((hidden, weight, targets), {"shard": VocabShard(vocab=132)}, "vocab=132"),
        ((hidden, weight, targets), {"into_main_grad": True}, "no main_grad"),
        ((hidden, weight, targets), {"positions": targets[:5]}, r"positions must be int64 \[19\]"),
    ):
        with pytest.raises(KernelError, match=message):
            linear_token_log_probs(*arguments, **options)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kept", [0, 50, COLUMNS])
@pytest.mark.parametrize("positions", [None, torch.arange(TOKENS).flip(0)])
def test_the_op_keeps_torchs_rules(positions: torch.Tensor | None, kept: int, entropy: bool) -> None:
    hidden, weight, targets, _ = drawn(torch.float32)
    block = COLUMNS if kept == COLUMNS else 25
    arguments = (hidden, weight, targets, 1.3, 0, WORDS, "", False, block, kept, False, entropy, positions)
    opcheck(
        _linear_token_log_probs, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    if not kept:  # kept logits, an output that no caller sees, are used up in eager mode and copied when compiled
        opcheck(_linear_token_log_probs, arguments, test_utils="test_aot_dispatch_dynamic")


def test_a_compiled_call_finds_the_same() -> None:
    hidden, weight, targets, weights = drawn(torch.float32)
    gradients = []
    for function in (linear_token_log_probs, torch.compile(linear_token_log_probs, backend="aot_eager")):
        found = function(hidden, weight, targets, memory_budget=9000).log_probs
        gradients.append(torch.autograd.grad((found * weights).sum(), (hidden, weight)))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)
