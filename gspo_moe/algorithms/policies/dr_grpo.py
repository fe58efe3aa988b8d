"""GRPO Done Right, arXiv 2503.20783: no division by a response's own length nor by the rewards' deviation.

The advantages are `group_advantages(..., scale=False)`. Shape letters: T tokens of a pack, N sequences of it.
"""

from __future__ import annotations

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def dr_grpo(inputs: LossInputs) -> Objective:
    """J_i = 1/L sum_t min(w_it A_i, clip(w_it) A_i) with w_it = exp(d_it), section 3.2.

    L is a constant, the generation budget (listing 1 of the paper), where grpo has |y_i|.
    """
    value_T, clipped_T = inputs.clip(inputs.log_ratio_T, inputs.advantages_T)
    return Objective(inputs.fixed_mean(value_T), inputs.segments.sum(clipped_T.double()))


SPEC = Algorithm(
    name="dr_grpo",
    objective=dr_grpo,
    clips=(0.2, 0.2),
    average="fixed",
    advantages="group_unscaled",
    dual_clip=True,
)
