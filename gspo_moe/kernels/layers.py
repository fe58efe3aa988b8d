"""RMSNorm and rotary embedding on the CPU: one pass over the rows each way, where PyTorch's operators take six to ten.

Compiled code alone is here (`csrc/cpu/layer_kernels.h`): where `has_layer_kernels` says no, callers take PyTorch's
operators. Rows do not depend on each other, nor results on the number of threads.

Shape letters: T tokens, H heads, D elements of a row; X any dimensions before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gspo_moe.kernels.library import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("gspo_moe", "FRAGMENT")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)")
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor")


def has_layer_kernels(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the functions here take these tensors: of one dtype, on the CPU, with the kernels built."""
    if x.device.type != "cpu" or kernels().cpu is None or x.dtype not in DTYPES:
        return False
    return all(other.dtype == x.dtype for other in others)


def rms_norm(x_XHD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean of x^2 over D + eps) * weight (arXiv 1910.07467), computed in float32 and rounded once."""
    if torch.is_grad_enabled():
        normed: torch.Tensor = _RMSNorm.apply(x_XHD, weight_D, eps)
        return normed
    return _norm(x_XHD, weight_D, eps)[0]


def rotary(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """x cos + [-right half of x, left half] sin (RoFormer, arXiv 2104.09864, eq. 34), rounded once."""
    if torch.is_grad_enabled():
        turned_THD: torch.Tensor = _Rotary.apply(x_THD, cos_TD, sin_TD)
        return turned_THD
    return _turn(x_THD, cos_TD, sin_TD, backward=False)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XHD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        out_XHD, scale = _norm(x_XHD, weight_D, eps)
        ctx.save_for_backward(x_XHD, weight_D, scale)
        return out_XHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_XHD, weight_D, scale = ctx.saved_tensors
        rows = _rows(grad_XHD), _rows(x_XHD)
        grad_x, sums = torch.ops.gspo_moe.rms_norm_backward.default(*rows, weight_D, scale)
        return grad_x.view(x_XHD.shape), sums.sum(0).to(weight_D.dtype), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turn(x_THD, cos_TD, sin_TD, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _turn(grad_THD, *ctx.saved_tensors, backward=True), None, None


def _norm(x_XHD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, scale = torch.ops.gspo_moe.rms_norm.default(_rows(x_XHD), weight_D, eps)
    return out.view(x_XHD.shape), scale


def _turn(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, *, backward: bool) -> torch.Tensor:
    turned_THD: torch.Tensor = torch.ops.gspo_moe.rotary.default(_rows(x_THD), cos_TD, sin_TD, backward)
    return turned_THD


def _rows(x_XHD: torch.Tensor) -> torch.Tensor:
    """[T, H, D] with adjacent elements in a row; a copy only where no view is that."""
    rows_THD = x_XHD.reshape(x_XHD.shape[:-2].numel(), *x_XHD.shape[-2:]) if x_XHD.ndim != 3 else x_XHD
    return rows_THD if rows_THD.stride(-1) == 1 else rows_THD.contiguous()
