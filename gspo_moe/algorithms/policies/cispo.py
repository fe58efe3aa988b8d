"""Clipped IS-weight Policy Optimization, arXiv 2506.13585. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

from gspo_moe.algorithms.ratios import LossInputs, Objective, weighted
from gspo_moe.algorithms.spec import Algorithm


def cispo(inputs: LossInputs) -> Objective:
    """J = 1 / sum_i |y_i| sum_i sum_t sg[clip(w_it)] A_i log pi(y_it) with w_it = exp(d_it), equations 4 and 5.

    No token loses its gradient: the weight is bounded and held constant. Tokens whose weight the bounds cut count as
    clipped, whatever the sign of their advantage.
    """
    ratio_T = inputs.log_ratio_T.detach().exp()
    weight_T = ratio_T.clamp(1.0 - inputs.clip_low, 1.0 + inputs.clip_high)
    value_T = weighted(inputs.log_probs_T, weighted(weight_T, inputs.advantages_T))
    return Objective(inputs.token_mean(value_T), inputs.segments.sum((weight_T != ratio_T).double()))


# The paper prints no clips: no lower bound here, and weights up to 5 as in 2510.13786.
SPEC = Algorithm(name="cispo", objective=cispo, clips=(1.0, 4.0), average="token", unbounded_below=True)
