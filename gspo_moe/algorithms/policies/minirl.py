"""MiniRL of "Stabilizing RL with LLMs", arXiv 2512.01374. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

from pydantic import PositiveFloat

from gspo_moe.algorithms.ratios import LossInputs, Objective, weighted
from gspo_moe.algorithms.spec import Algorithm
from gspo_moe.section import Section


class MinirlOptions(Section):
    """truncation: the most that a token's weight may be, section 4.2; null for any."""

    truncation: PositiveFloat | None = 5.0


def minirl(inputs: LossInputs) -> Objective:
    """J_i = sum_t M_it sg[min(w_it, 5)] A_i log pi(y_it) with w_it = exp(d_it), equation 7; no length divides it.

    M_it = 0, and the token counts as clipped, where A_i > 0 and w_it > 1 + clip_high, or A_i < 0 and w_it < 1 -
    clip_low. The paper's weight is pi over the engine's policy, truncated whole: w_it is the part of it since the old
    policy, `algorithm.mismatch: {correction: tis, high: 5}` the rest.
    """
    cap: float | None = inputs.options.truncation
    advantages_T, ratio_T = inputs.advantages_T, inputs.log_ratio_T.detach().exp()
    low, high = 1.0 - inputs.clip_low, 1.0 + inputs.clip_high
    dropped_T = ((advantages_T > 0) & (ratio_T > high)) | ((advantages_T < 0) & (ratio_T < low))
    capped_T = ratio_T if cap is None else ratio_T.clamp(max=cap)
    weight_T = weighted(capped_T, advantages_T).masked_fill(dropped_T, 0.0)
    value_T = weighted(inputs.log_probs_T, weight_T)
    return Objective(inputs.sequence_sum(value_T), inputs.segments.sum(dropped_T.double()))


SPEC = Algorithm(
    name="minirl",
    objective=minirl,
    clips=(0.2, 0.27),
    average="sum",
    advantages="group_unscaled",
    options=MinirlOptions,
)
