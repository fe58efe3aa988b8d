"""One rank's share of the work; several ranks together are in tests/distributed/test_policy_layouts.py."""

import pytest
import torch

from gspo_moe.parallel.vocab import vocab_parallel_first_choice, vocab_parallel_log_probs


def drawn(tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits = 4 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(vocabulary, (tokens,), generator=generator)


def reference(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    log_probs = torch.log_softmax(logits.double() / temperature, dim=1)
    return log_probs[torch.arange(len(targets)), targets]


# bf16 logits: the values are those of fp32 arithmetic, the gradient is rounded to 8 bits when handed back.
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 4e-3)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_values_and_gradients_are_those_of_log_softmax(
    dtype: torch.dtype, value_error: float, gradient_error: float, temperature: float
) -> None:
    logits, targets = drawn(17, 61, dtype)
    scaled = logits if temperature == 1.0 else logits / temperature
    exact = scaled.detach().double().requires_grad_()
    weights = torch.randn(17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = vocab_parallel_log_probs(logits, targets, temperature=temperature)
    expected = reference(exact, targets, 1.0)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=value_error, rtol=value_error)
    (found * weights.to(found.dtype)).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad / temperature, atol=gradient_error, rtol=gradient_error)


def test_the_first_column_may_be_any_token() -> None:
    logits, targets = drawn(9, 30)
    found = vocab_parallel_log_probs(logits, targets + 100, vocab_start=100)
    torch.testing.assert_close(found.double(), reference(logits, targets, 1.0), atol=1e-6, rtol=1e-6)


def test_a_target_of_another_rank_counts_as_logit_zero_here() -> None:
    logits, _ = drawn(4, 30)
    found = vocab_parallel_log_probs(logits, torch.tensor([99, 130, 131, 0]), vocab_start=100)
    torch.testing.assert_close(found.double(), -logits.double().logsumexp(dim=1), atol=1e-6, rtol=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), -logits.double().softmax(dim=1), atol=1e-6, rtol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_difference() -> None:
    logits = torch.tensor([[3e4, 3e4 - 2.0, -3e4], [-3e4, -3e4, -3e4]], requires_grad=True)
    found = vocab_parallel_log_probs(logits, torch.tensor([1, 2]))
    expected = torch.tensor([-2.0, 0.0]) - torch.tensor([1 + torch.e**-2.0, 3.0]).log()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_masked_columns_take_no_probability_and_no_gradient(temperature: float) -> None:
    logits, targets = drawn(6, 20)
    masked = torch.cat([logits, torch.full((6, 3), torch.finfo(torch.float32).min)], dim=1).detach().requires_grad_()
    found = vocab_parallel_log_probs(masked, targets, temperature=temperature)
    torch.testing.assert_close(found.double(), reference(logits, targets, temperature), atol=1e-6, rtol=1e-6)
    found.sum().backward()
    assert masked.grad is not None
    assert torch.equal(masked.grad[:, 20:], torch.zeros(6, 3))
    assert masked.grad[:, :20].abs().min() > 0


def test_a_slice_without_a_token_adds_nothing() -> None:
    nothing = torch.empty(3, 0, requires_grad=True)
    found = vocab_parallel_log_probs(nothing, torch.tensor([1, 2, 3]), temperature=0.5, vocab_start=30)
    assert found.tolist() == [torch.inf] * 3  # 0 - log 0, until other ranks' slices have a part in it
    found.sum().backward()
    assert not vocab_parallel_first_choice(nothing.detach(), torch.tensor([1, 2, 3]), vocab_start=30).any()


def test_first_choice_is_the_largest_logit_and_ties_count() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [5.0, 4.0, 4.9]])
    assert vocab_parallel_first_choice(logits, torch.tensor([1, 0, 1, 2])).tolist() == [True, True, True, False]
    assert vocab_parallel_first_choice(logits, torch.tensor([11, 9, 9, 11]), vocab_start=10).tolist() == [
        True,
        False,
        False,
        False,
    ]
