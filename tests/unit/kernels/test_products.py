"""The output layer's products against float64, by either library."""

from __future__ import annotations

import pytest
import torch

from gspo_moe.kernels import linear_token_log_probs, products

TOKENS, HIDDEN, WORDS = 19, 16, 131

onednn = pytest.mark.skipif(not products.ONEDNN, reason="this torch comes without oneDNN")


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "FASTER", True)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@onednn
def test_onednn_takes_large_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE", TOKENS * HIDDEN * WORDS)
    left, right = drawn(TOKENS, HIDDEN), drawn(WORDS, HIDDEN).T
    assert products.suits_onednn(left, right)
    assert not products.suits_onednn(left[1:], right)
    assert not products.suits_onednn(left.T.contiguous().T, right)
    assert not products.suits_onednn(left.bfloat16(), right.bfloat16())
    exact = left.double() @ right.double()
    torch.testing.assert_close(products.onednn_mm(left, right).double(), exact, atol=1e-5, rtol=1e-6)


@onednn
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_a_sum_takes_products_of_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "ROWS", rows)
    left, right, total = drawn(TOKENS, WORDS), drawn(WORDS, HIDDEN), drawn(TOKENS, HIDDEN)
    exact = total.double() + left.double() @ right.double()
    products.add_product_(total, left, right, left.new_empty(0))
    torch.testing.assert_close(total.double(), exact, atol=2e-5, rtol=1e-6)


@onednn
@pytest.mark.parametrize("budget", [1, 5000, 9000, 2**20])
def test_log_probs_and_gradients_by_onednn(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    hidden, weight = drawn(TOKENS, HIDDEN).requires_grad_(), drawn(WORDS, HIDDEN).requires_grad_()
    targets, weights = torch.arange(TOKENS) * 5, drawn(TOKENS)
    exact, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    expected = torch.log_softmax(exact @ exact_weight.T, dim=1).gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "ROWS", 8)
    found = linear_token_log_probs(hidden, weight, targets, memory_budget=budget).log_probs
    (found * weights).sum().backward()
    for ours, theirs in ((found, expected), (hidden.grad, exact.grad), (weight.grad, exact_weight.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)
