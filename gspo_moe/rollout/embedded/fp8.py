"""Values as FP8 products see them: float8_e4m3fn with a scale for each block of weights and each group of a token.

Scales are powers of two, the smallest that bring a block's largest value to at most 448. So a rounded value has four
significant bits, is exact in bfloat16, and a bfloat16 product of such values, added up in float32, is the block-scaled
FP8 product. A block's scale decides only what becomes of values 2^13.8 times smaller than its largest: blocks of a
tensor rank's shard, as here, or of the whole weight give the same values but for those.

Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2: weights by 128 x 128, activations by 1 x 128) with the scales of
DeepSeek-V3.1 (`scale_fmt: ue8m0`), as vLLM computes them for DeepGEMM: `per_block_cast_to_fp8(use_ue8m0=True)` of
vllm/utils/deep_gemm.py and `per_token_group_quant_fp8` of layers/quantization/utils/fp8_utils.py.

Shape letters: X any dimensions, O and I a linear layer's outputs and inputs, P and Q blocks of R rows and C columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 128
LARGEST_EXPONENT, LARGEST_MANTISSA = 9, 0.875  # 448 = 0.875 * 2^9
BIAS, MANTISSA_BITS = 127, 23  # of float32


def round_weight(weight_XOI: torch.Tensor) -> torch.Tensor:
    """Each matrix with a scale a block of 128 x 128, in float32; the last blocks may be smaller."""
    outputs, inputs = weight_XOI.shape[-2:]
    rows, columns = min(BLOCK, outputs), min(BLOCK, inputs)
    padded = F.pad(weight_XOI.float(), (0, -inputs % columns, 0, -outputs % rows))
    blocks_XPRQC = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    rounded = _rounded(blocks_XPRQC, blocks_XPRQC.abs().amax((-3, -1), keepdim=True))
    return rounded.flatten(-2).flatten(-3, -2)[..., :outputs, :inputs]


def round_activations(values_XI: torch.Tensor) -> torch.Tensor:
    """Each token with a scale every 128 elements, in the values' dtype."""
    inputs = values_XI.shape[-1]
    columns = min(BLOCK, inputs)
    groups_XQC = F.pad(values_XI.float(), (0, -inputs % columns)).unflatten(-1, (-1, columns))
    rounded = _rounded(groups_XQC, groups_XQC.abs().amax(-1, keepdim=True))
    return rounded.flatten(-2)[..., :inputs].to(values_XI.dtype)


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scale = _scale(largest)
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def _scale(largest: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is at least largest / 448, made of its bits: exact on every device.

    NaN where `largest` is not finite, so that a broken model's values stay broken.
    """
    mantissa, exponent = torch.frexp(largest)
    power = exponent - LARGEST_EXPONENT + (mantissa > LARGEST_MANTISSA).int()
    scale = ((power.clamp(1 - BIAS, BIAS) + BIAS) << MANTISSA_BITS).view(torch.float32)
    return scale.where(largest.isfinite(), torch.nan)
