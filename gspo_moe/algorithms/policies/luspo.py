"""Length-Unbiased Sequence Policy Optimization, arXiv 2602.05261.

Shape letters: T tokens of a pack, N sequences of it.
"""

from __future__ import annotations

from gspo_moe.algorithms.policies.gspo import gspo
from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def luspo(inputs: LossInputs) -> Objective:
    """J_i = |y_i| min(s_i A_i, clip(s_i) A_i) with s_i = exp(mean_t d_it): gspo, sequences weighed by their length.

    A token's gradient is then s_i A_i whatever the length of its sequence. The clips are those of section 5.1.
    """
    found = gspo(inputs)
    return found._replace(value_N=found.value_N * inputs.segments.lengths_N)


SPEC = Algorithm(
    name="luspo",
    objective=luspo,
    clips=(2e-3, 2.5e-3),
    ratio="sequence",
    terms="sequence",
    average="sum",
    dual_clip=True,
)
