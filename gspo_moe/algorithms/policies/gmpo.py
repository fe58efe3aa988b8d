"""Geometric-Mean Policy Optimization, arXiv 2507.20673. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

import math

import torch

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def gmpo(inputs: LossInputs) -> Objective:
    """J_i = A_i (prod_t min(w_it^s, clip(w_it)^s)^s)^(1/|y_i|) with w_it = exp(d_it), s the sign of A_i, equation 4.

    A token is clipped on the same side as in grpo, and then takes no part in the gradient; the others share the
    sequence's.
    """
    return geometric_mean(inputs.log_ratio_T, inputs)


def geometric_mean(log_ratio_T: torch.Tensor, inputs: LossInputs) -> Objective:
    """gmpo's objective on other log-ratios. They need clip_low below 1."""
    low, high = torch.log1p(log_ratio_T.new_tensor([-inputs.clip_low, inputs.clip_high]))
    advantages_T = inputs.advantages_T
    clipped_T = ((advantages_T > 0) & (log_ratio_T > high)) | ((advantages_T < 0) & (log_ratio_T < low))
    kept_T = torch.where(clipped_T, log_ratio_T.detach().clamp(low, high), log_ratio_T)
    # An infinite mean times an advantage of 0 would be NaN.
    mean_N = torch.where(inputs.advantages_N == 0, 0.0, inputs.segments.mean(kept_T))
    value_N = inputs.advantages_N * mean_N.exp()
    return Objective(value_N, inputs.segments.sum(clipped_T.double()))


SPEC = Algorithm(name="gmpo", objective=gmpo, clips=(1.0 - math.exp(-0.4), math.exp(0.4) - 1.0), terms="sequence")
