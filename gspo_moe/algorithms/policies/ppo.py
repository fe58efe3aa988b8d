"""Proximal Policy Optimization, arXiv 1707.06347. Shape letters: T tokens of a pack, N sequences of it.

Its advantages are one a token, from `gae`; the value function learns beside it, by `value`.
"""

from __future__ import annotations

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm, ValueOptions


def ppo(inputs: LossInputs) -> Objective:
    """J = 1 / sum_i |y_i| sum_i sum_t min(w_it A_it, clip(w_it) A_it) with w_it = exp(d_it), equation 7.

    The mean goes over the whole mini-batch's response tokens.
    """
    value_T, clipped_T = inputs.clip(inputs.log_ratio_T, inputs.advantages_T)
    return Objective(inputs.token_mean(value_T), inputs.segments.sum(clipped_T.double()))


SPEC = Algorithm(
    name="ppo",
    objective=ppo,
    clips=(0.2, 0.2),
    average="token",
    advantages="gae",
    dual_clip=True,
    options=ValueOptions,
)
