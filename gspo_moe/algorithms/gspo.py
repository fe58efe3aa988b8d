"""Group Sequence Policy Optimization, arXiv 2507.18071. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

import torch

from gspo_moe.algorithms.ratios import Objective, Segments, clip


def gspo(
    log_ratio_T: torch.Tensor, advantages_N: torch.Tensor, segments: Segments, clip_low: float, clip_high: float
) -> Objective:
    """J_i = min(s_i A_i, clip(s_i) A_i) with s_i = exp(mean_t d_it), section 4.1 of the paper.

    log_ratio_T: float64, d with gradient; advantages_N: float64.
    """
    value_N, clipped_N = clip(segments.mean(log_ratio_T).exp(), advantages_N, clip_low, clip_high)
    return Objective(value_N, clipped_N * segments.lengths_N)


def gspo_token(
    log_ratio_T: torch.Tensor, advantages: torch.Tensor, segments: Segments, clip_low: float, clip_high: float
) -> Objective:
    """J_i = mean_t min(s_it A_it, clip(s_it) A_it) with s_it = sg[s_i] pi(y_it) / sg[pi(y_it)], section 4.3.

    log_ratio_T: float64, d with gradient; advantages: float64, [N] or, where sequences are whole, one a token [T].
    """
    frozen_T = log_ratio_T.detach()
    ratio_T = segments.mean(frozen_T).exp()[segments.sequence_T] * (log_ratio_T - frozen_T).exp()
    # [N] first: a rank that holds parts of sequences may have N tokens by chance.
    by_sequence = advantages.shape == segments.lengths_N.shape
    advantages_T = advantages[segments.sequence_T] if by_sequence else advantages
    value_T, clipped_T = clip(ratio_T, advantages_T, clip_low, clip_high)
    return Objective(segments.mean(value_T), segments.sum(clipped_T.double()))
