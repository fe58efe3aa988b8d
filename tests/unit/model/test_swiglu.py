"""The experts' activation against autograd of its expression, and what it keeps for the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gspo_moe.model.swiglu import weighted_swiglu


def expression(product_NP: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
    gate_NF, up_NF = product_NP.chunk(2, dim=-1)
    return (F.silu(gate_NF) * up_NF * probs_N[:, None]).to(product_NP.dtype)


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_autograds_bit_for_bit(
    dtype: torch.dtype, probs_dtype: torch.dtype, rows: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, 48, generator=generator).to(dtype), torch.rand(rows, generator=generator).to(probs_dtype)
    upstream = torch.randn(rows, 24, generator=generator).to(dtype)
    found = []
    for function in (weighted_swiglu, expression):
        inputs = [value.clone().requires_grad_() for value in values]
        out = function(*inputs)
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_only_the_inputs_are_kept() -> None:
    kept: list[torch.Tensor] = []
    product, probs = torch.randn(5, 8, requires_grad=True), torch.rand(5, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        weighted_swiglu(product, probs)
    assert [tensor.data_ptr() for tensor in kept] == [product.data_ptr(), probs.data_ptr()]
