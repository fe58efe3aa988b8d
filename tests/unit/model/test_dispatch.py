"""Laying tokens out by expert and adding them up again, against megatron-core's permute and unpermute, and float64."""

import pytest
import torch

from gspo_moe.model.dispatch import RowOrder, chosen, collect, row_order, spread

TOKENS, EXPERTS, HIDDEN = 23, 6, 16


def routes(topk: int, padding: int, seed: int = 1) -> torch.Tensor:
    """A map [T, E] in which the last `padding` tokens have no experts."""
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    map_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, scores_TE.topk(topk).indices, True)
    map_TE[TOKENS - padding :] = False
    return map_TE


def order_of(map_TE: torch.Tensor) -> RowOrder:
    return row_order(map_TE, int(map_TE.sum()))


def tensors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("topk", "padding"), [(1, 0), (3, 0), (6, 4), (2, TOKENS)])
def test_rows_and_sums_are_megatrons_bit_for_bit(topk: int, padding: int, dtype: torch.dtype) -> None:
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    map_TE = routes(topk, padding)
    hidden_TH, probs_TE = tensors(TOKENS, HIDDEN, dtype=dtype), tensors(TOKENS, EXPERTS)
    count = int(map_TE.sum())
    rows, probs, indices = permute(hidden_TH, map_TE, probs=probs_TE, num_out_tokens=count)[:3]
    order = order_of(map_TE)
    assert torch.equal(spread(hidden_TH, order), rows)
    assert torch.equal(chosen(probs_TE, order), probs)
    results = tensors(count, HIDDEN, dtype=dtype, seed=3)
    summed = collect(results, order)
    assert summed.dtype == dtype
    assert torch.equal(summed, unpermute(results, indices, hidden_TH.shape))
    assert (summed[TOKENS - padding :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("topk", "padding"), [(3, 0), (4, 5), (2, TOKENS)])
def test_gradients_are_those_of_float64(topk: int, padding: int, dtype: torch.dtype) -> None:
    map_TE = routes(topk, padding)
    order = order_of(map_TE)
    inputs = [tensors(TOKENS, HIDDEN, dtype=dtype), tensors(TOKENS, EXPERTS)]
    ours = [value.clone().requires_grad_() for value in inputs]
    rows = spread(ours[0], order)
    out = collect((rows * chosen(ours[1], order)[:, None]).to(dtype), order)
    gradient = tensors(TOKENS, HIDDEN, dtype=dtype, seed=5)
    out.backward(gradient)
    # Each token's hidden state times the sum of its gates, as one dense formula.
    exact = [value.double().requires_grad_() for value in inputs]
    (exact[0] * (exact[1] * map_TE).sum(1, keepdim=True)).backward(gradient.double())
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for value, reference in zip(ours, exact, strict=True):
        assert value.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(value.grad.double(), reference.grad, atol=tolerance, rtol=tolerance)
        assert (value.grad[TOKENS - padding :] == 0).all()


def test_a_tokens_bits_do_not_depend_on_its_place() -> None:
    map_TE, hidden_TH = routes(3, padding=2), tensors(TOKENS, HIDDEN)
    shuffled = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(6))

    def through(map_TE: torch.Tensor, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = order_of(map_TE)
        hidden_TH = hidden_TH.clone().requires_grad_()
        rows = spread(hidden_TH, order)
        # What an expert does differs from the next one's.
        collected = collect(rows * (1 + order.expert_N[:, None]) / 7, order)
        collected.backward(hidden_TH.detach().sin())
        assert hidden_TH.grad is not None
        return collected.detach(), hidden_TH.grad

    plain, moved = through(map_TE, hidden_TH), through(map_TE[shuffled], hidden_TH[shuffled])
    assert all(torch.equal(one[shuffled], other) for one, other in zip(plain, moved, strict=True))
