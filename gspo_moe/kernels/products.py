"""Matrix products of the output layer, each on the CPU by the faster of the libraries that torch comes with.

For float32 torch.mm takes MKL, which on AMD's processors with AVX-512 is up to a tenth slower than oneDNN, torch's
library for 16-bit products; on those with AVX2 it is faster. `torch.ops.mkldnn._linear_pointwise` is how torch.compile
calls oneDNN.
"""

from __future__ import annotations

import torch

from gspo_moe.kernels.ops import accumulate_

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"  # than MKL
LARGE = 2**30  # multiplications: below, preparing oneDNN for a new shape costs more than it gains
ROWS = 1024  # of a sum at a time, since oneDNN's results are in memory of their own


def suits_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether `onednn_mm` takes less time than torch.mm; a transposed left factor it would copy."""
    large = ONEDNN and FASTER and left.numel() * right.shape[1] >= LARGE
    return large and left.dtype == torch.float32 and left.device.type == "cpu" and left.is_contiguous()


def onednn_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right for float32 on the CPU."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return found


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, memory: torch.Tensor) -> None:
    """total += left @ right; a float32 total also takes 16-bit factors, on the CPU with `memory` for their product."""
    if total.dtype != left.dtype:
        if total.is_cuda:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:  # torch's CPU product of 16-bit factors is summed in float32 and rounded, here once a block
            accumulate_(total, torch.mm(left, right, out=memory[: total.numel()].view(total.shape)))
    elif suits_onednn(left, right):
        for total_rows, left_rows in zip(total.split(ROWS), left.split(ROWS), strict=True):
            total_rows += onednn_mm(left_rows, right)
    else:
        total.addmm_(left, right)
