"""Variational sEquence-level Soft Policy Optimization, arXiv 2602.10693.

Shape letters: T tokens of a pack, N sequences of it.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from gspo_moe.algorithms.ratios import LossInputs, Objective, weighted
from gspo_moe.algorithms.spec import Algorithm
from gspo_moe.section import Section


class VespoOptions(Section):
    """phi(W) = W^k exp(lambda (1 - W)) for A > 0 and for A < 0: the paper's c1 and c2, values of its code and TRL."""

    k_positive: NonNegativeFloat = 2.0
    lambda_positive: PositiveFloat = 3.0
    k_negative: NonNegativeFloat = 3.0
    lambda_negative: PositiveFloat = 2.0


def vespo(inputs: LossInputs) -> Objective:
    """J = 1 / sum_i |y_i| sum_i sg[phi(W_i)] A_i sum_t log pi(y_it) with W_i = exp(sum_t d_it), section 3.4.

    W_i is the whole sequence's ratio: no length normalises it. phi is 1 at W = 1 and fades on both sides; nothing is
    cut, so no token counts as clipped. Tokens are averaged as in the authors' scripts. A weight against the engine
    belongs into W, where `algorithm.old_log_probs: rollout` has it: w phi(W) is not phi(w W).
    """
    options: VespoOptions = inputs.options
    advantages_N, segments = inputs.advantages_N, inputs.segments
    log_ratio_N = segments.sum(inputs.log_ratio_T.detach())
    k_positive, k_negative, positive, negative = advantages_N.new_tensor(
        [options.k_positive, options.k_negative, options.lambda_positive, options.lambda_negative]
    )
    k_N = torch.where(advantages_N > 0, k_positive, k_negative)
    lambda_N = torch.where(advantages_N > 0, positive, negative)
    ratio_N = log_ratio_N.exp()
    # Both are infinite where W overflows, and 0 times infinity where k is 0 and W vanishes.
    exponent_N = weighted(log_ratio_N, k_N) + lambda_N * (1.0 - ratio_N)
    phi_N = torch.where(ratio_N == torch.inf, 0.0, exponent_N.exp())
    weight_T = weighted(phi_N[segments.sequence_T], inputs.advantages_T)
    value_T = weighted(inputs.log_probs_T, weight_T)
    # The mean of a sequence's number over its tokens is that number.
    phi_T = torch.where(segments.response_T, phi_N[segments.sequence_T], 0.0)
    return Objective(inputs.token_mean(value_T), torch.zeros_like(segments.lengths_N), {"algorithm/phi": phi_T.sum()})


SPEC = Algorithm(name="vespo", objective=vespo, clips=None, average="token", whole_ratio=True, options=VespoOptions)
