"""Rotary factors of explicit positions: RoFormer's (arXiv 2104.09864), or YaRN's (arXiv 2309.00071) as transformers 5
computes them.

Shape letters: T tokens, D head size, F pairs of dimensions (D / 2).
"""

from __future__ import annotations

import math

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.rope import Yarn


def rotary_factors(position_ids_T: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_TD, sin_TD (fp32): what `attention.rotate` takes. position_ids_T: int64."""
    exponent_F = torch.arange(0, architecture.head_dim, 2, device=position_ids_T.device, dtype=torch.float32)
    period_F = architecture.rope_theta ** (exponent_F / architecture.head_dim)
    frequency_F, scale = 1.0 / period_F, 1.0
    yarn = architecture.rope_scaling
    if yarn is not None:
        kept_F = 1 - _slow_share(yarn, architecture.rope_theta, period_F)
        frequency_F = 1.0 / (yarn.factor * period_F) * (1 - kept_F) + frequency_F * kept_F
        scale = attention_factor(yarn)
    angle_TD = torch.outer(position_ids_T.float(), frequency_F).repeat(1, 2)
    return angle_TD.cos() * scale, angle_TD.sin() * scale


def attention_factor(yarn: Yarn) -> float:
    """What YaRN multiplies cosines and sines by, so that scores grow by its square (section 3.4)."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    growth = 0.1 * math.log(yarn.factor)
    if yarn.mscale and yarn.mscale_all_dim:
        return (growth * yarn.mscale + 1.0) / (growth * yarn.mscale_all_dim + 1.0)
    return growth + 1.0


def _slow_share(yarn: Yarn, theta: float, period_F: torch.Tensor) -> torch.Tensor:
    """0 for dimensions that turn fast, 1 for those that turn slowly, a ramp between (section 3.2)."""
    size = 2 * period_F.numel()

    def dimension(turns: float) -> float:
        # The dimension that turns that often within the original positions.
        positions = yarn.original_max_position_embeddings
        return size * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # as transformers has it
    number_F = torch.arange(period_F.numel(), device=period_F.device, dtype=torch.float32)
    return ((number_F - low) / (high - low)).clamp(0, 1)
