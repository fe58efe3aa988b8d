"""The activation between an expert's two products, silu(gate) * up * gate weight, which keeps nothing but its inputs.

Autograd of the same expression would keep three more tensors as wide as the activation, and join the halves of its
gradient by a copy. Here the backward makes them anew, one at a time, and writes each half where it stays.

Invariant: results and gradients are those of autograd bit for bit: the same operators in the same dtypes.

Shape letters: N rows, F width of an expert, P = 2 F: the gate's columns, then the up projection's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def weighted_swiglu(product_NP: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * probs, [N, F] in the dtype of `product_NP`; probs_N: in any floating dtype."""
    inner_NF: torch.Tensor = _WeightedSwiGLU.apply(product_NP, probs_N)
    return inner_NF


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product_NP: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(product_NP, probs_N)
        gate_NF, up_NF = product_NP.chunk(2, dim=-1)
        return _times(F.silu(gate_NF).mul_(up_NF), probs_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product_NP, probs_N = ctx.saved_tensors
        gate_NF, up_NF = product_NP.chunk(2, dim=-1)
        grad_NP = torch.empty_like(product_NP)
        grad_gate_NF, grad_up_NF = grad_NP.chunk(2, dim=-1)
        silu_NF = F.silu(gate_NF)
        wide_NF = grad_NF.to(torch.promote_types(grad_NF.dtype, probs_N.dtype))
        grad_probs_N = (wide_NF * (silu_NF * up_NF)).sum(dim=-1).to(probs_N.dtype)
        grad_active_NF = (wide_NF * probs_N[:, None]).to(grad_NF.dtype)
        torch.mul(grad_active_NF, silu_NF, out=grad_up_NF)
        torch.ops.aten.silu_backward(grad_active_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
        return grad_NP, grad_probs_N


def _times(active_NF: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
    if active_NF.dtype == torch.promote_types(active_NF.dtype, probs_N.dtype):
        return active_NF.mul_(probs_N[:, None])
    return (active_NF * probs_N[:, None]).to(active_NF.dtype)
