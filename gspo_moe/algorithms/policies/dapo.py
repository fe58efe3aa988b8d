"""Decoupled Clip and Dynamic sAmpling Policy Optimization, arXiv 2503.14476.

Clip-higher is a matter of the clips' defaults; dynamic sampling (equation 11) is in `training.collect`, the over-long
punishment in `algorithms.overlong`.
Shape letters: T tokens of a pack, N sequences of it.
"""

from __future__ import annotations

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def dapo(inputs: LossInputs) -> Objective:
    """J = 1 / sum_i |y_i| sum_i sum_t min(w_it A_i, clip(w_it) A_i) with w_it = exp(d_it), equation 8.

    The sum of lengths goes over the whole mini-batch.
    """
    value_T, clipped_T = inputs.clip(inputs.log_ratio_T, inputs.advantages_T)
    return Objective(inputs.token_mean(value_T), inputs.segments.sum(clipped_T.double()))


SPEC = Algorithm(
    name="dapo",
    objective=dapo,
    clips=(0.2, 0.28),
    average="token",
    dual_clip=True,
    dynamic_sampling=True,
    overlong_share=5,  # 4096 of 20480 tokens in the paper
)
