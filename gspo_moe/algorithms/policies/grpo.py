"""Group Relative Policy Optimization, arXiv 2402.03300. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def grpo(inputs: LossInputs) -> Objective:
    """J_i = mean_t min(w_it A_i, clip(w_it) A_i) with w_it = exp(d_it), section 4.1 without its KL term."""
    value_T, clipped_T = inputs.clip(inputs.log_ratio_T, inputs.advantages_T)
    return Objective(inputs.sequence_mean(value_T), inputs.segments.sum(clipped_T.double()))


SPEC = Algorithm(name="grpo", objective=grpo, clips=(0.2, 0.27), dual_clip=True)
