"""Group Relative Policy Optimization, arXiv 2402.03300. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

import torch

from gspo_moe.algorithms.ratios import Objective, Segments, clip


def grpo(
    log_ratio_T: torch.Tensor, advantages_N: torch.Tensor, segments: Segments, clip_low: float, clip_high: float
) -> Objective:
    """J_i = mean_t min(w_it A_i, clip(w_it) A_i) with w_it = exp(d_it), section 4.1 of the paper without its KL term.

    log_ratio_T: float64, d with gradient; advantages_N: float64.
    """
    value_T, clipped_T = clip(log_ratio_T.exp(), advantages_N[segments.sequence_T], clip_low, clip_high)
    return Objective(segments.mean(value_T), segments.sum(clipped_T.double()))
