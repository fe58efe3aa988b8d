"""Stacked experts and the ordered dispatch on a GPU: right numbers, equal bits, and no wait for the device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gspo_moe.model.dispatch import chosen, collect, row_order, spread
from gspo_moe.model.experts import grouped_linear
from tests.gpu.test_golden import needs

TOKENS, EXPERTS, TOPK, HIDDEN, WIDTH = 300, 16, 4, 64, 32
EMPTY = (0, 7, EXPERTS - 1)  # experts without tokens


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Makes torch raise where it waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def leaves() -> dict[str, torch.Tensor]:
    found = {
        "hidden": values(TOKENS, HIDDEN, seed=1),
        "probs": values(TOKENS, EXPERTS, seed=2).float(),
        "weight": values(EXPERTS, WIDTH, HIDDEN, seed=3),
    }
    return {name: value.requires_grad_() for name, value in found.items()}


def routes() -> torch.Tensor:
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    scores_TE[:, list(EMPTY)] = -1
    return torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, scores_TE.topk(TOPK).indices, True).cuda()


def layer(inputs: dict[str, torch.Tensor], map_TE: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Every token's weighted sum over its experts of one linear layer, and the gradients."""
    order = row_order(map_TE, TOKENS * TOPK)
    ends_E = map_TE.sum(0).cumsum(0).to(torch.int32)
    rows = grouped_linear(spread(inputs["hidden"], order), inputs["weight"], ends_E)
    out = collect((rows * chosen(inputs["probs"], order)[:, None]).to(rows.dtype), order)
    return [out, *torch.autograd.grad(out, list(inputs.values()), gradient)]


def test_a_layer_matches_float64_repeats_its_bits_and_waits_for_nothing() -> None:
    needs("local")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product waits on GPUs before compute capability 9.0")
    inputs, map_TE, gradient = leaves(), routes(), values(TOKENS, WIDTH, seed=5)
    layer(inputs, map_TE, gradient)  # loads kernels
    with no_wait():
        found, again = layer(inputs, map_TE, gradient), layer(inputs, map_TE, gradient)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    exact: dict[str, Any] = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    dense = torch.einsum("th,ewh,te->tw", exact["hidden"], exact["weight"], exact["probs"] * map_TE)
    expected = [dense, *torch.autograd.grad(dense, list(exact.values()), gradient.double())]
    for value, reference in zip(found, expected, strict=True):
        assert (value.double() - reference).norm() < 0.02 * reference.norm()
    assert (found[3][list(EMPTY)] == 0).all(), "experts without tokens"
