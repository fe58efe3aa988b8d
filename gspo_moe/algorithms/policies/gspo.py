"""Group Sequence Policy Optimization, arXiv 2507.18071. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def gspo(inputs: LossInputs) -> Objective:
    """J_i = min(s_i A_i, clip(s_i) A_i) with s_i = exp(mean_t d_it), section 4.1 of the paper."""
    segments = inputs.segments
    value_N, clipped_N = inputs.clip(segments.mean(inputs.log_ratio_T), inputs.advantages_N)
    return Objective(value_N, clipped_N * segments.lengths_N)


SPEC = Algorithm(
    name="gspo",
    objective=gspo,
    clips=(3e-4, 4e-4),
    ratio="sequence",
    terms="sequence",
    dual_clip=True,
    fused="sequence",
)
