r"""An algorithm of one's own: REINFORCE with weights that fade as the policy leaves the one that sampled.

PYTHONPATH=examples gspo-moe train examples/quickstart.yaml \
    algorithm.name=my_algorithm:FADING algorithm.options.width=0.5
"""

import torch
from pydantic import PositiveFloat

from gspo_moe.algorithms import Algorithm, LossInputs, Objective
from gspo_moe.section import Section


class FadingOptions(Section):
    """width: of the log-ratio, at which a token's weight is exp(-1/2)."""

    width: PositiveFloat = 1.0


def fading(inputs: LossInputs) -> Objective:
    """J_i = mean_t sg[w_it] A_i log pi(y_it) with w_it = exp(-(d_it / width)^2 / 2); `T` is tokens of a pack."""
    weights_T = torch.exp(-0.5 * (inputs.log_ratio_T.detach() / inputs.options.width).square())
    value_T = weights_T * inputs.advantages_T * inputs.log_probs_T
    weight = weights_T[inputs.segments.response_T].sum()
    nothing_clipped_N = torch.zeros_like(inputs.segments.lengths_N)
    return Objective(inputs.sequence_mean(value_T), nothing_clipped_N, {"algorithm/weight": weight})


FADING = Algorithm(name="fading", objective=fading, clips=None, options=FadingOptions)
