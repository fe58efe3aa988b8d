"""Decoupled Clip and Dynamic sAmpling Policy Optimization, arXiv 2503.14476.

Clip-higher is a matter of the clips' defaults; dynamic sampling (equation 11) is in `training.collect`.
Shape letters: T tokens of a pack, N sequences of it.
"""

from __future__ import annotations

import torch

from gspo_moe.algorithms.ratios import LossInputs, Objective, clip


def dapo(inputs: LossInputs) -> Objective:
    """J = 1 / sum_i |y_i| sum_i sum_t min(w_it A_i, clip(w_it) A_i) with w_it = exp(d_it), equation 8.

    The sum of lengths goes over the whole mini-batch.
    """
    value_T, clipped_T = clip(inputs.log_ratio_T, inputs.advantages_T, inputs.clip_low, inputs.clip_high)
    return Objective(inputs.token_mean(value_T), inputs.segments.sum(clipped_T.double()))


def overlong_penalty(lengths: torch.Tensor, max_response_tokens: int, buffer: int) -> torch.Tensor:
    """What is added to the rewards of responses of these lengths, equation 13: the soft over-long punishment.

    0 up to max_response_tokens - buffer tokens, from there a straight line to -1 at max_response_tokens, where
    generation ends. lengths: integers [N]; buffer: L_cache, at least 1. Returns float64 [N].
    """
    assert 0 < buffer <= max_response_tokens
    return ((max_response_tokens - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)
