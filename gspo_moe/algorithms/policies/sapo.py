"""Soft Adaptive Policy Optimization, arXiv 2511.20347. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm
from gspo_moe.section import Section

SATURATED = 800.0  # from there the sigmoid is 1 and its slope 0 in float64


class SapoOptions(Section):
    """Temperatures of the gate on tokens with A > 0 and with A < 0: the higher, the faster a gradient fades."""

    tau_positive: PositiveFloat = 1.0
    tau_negative: PositiveFloat = 1.05


def sapo(inputs: LossInputs) -> Objective:
    """J_i = mean_t f(w_it) A_i with f(w) = 4/tau sigmoid(tau (w - 1)) and w_it = exp(d_it).

    The gate's slope is 1 at w = 1 for any tau and fades on both sides; nothing is cut, so no token counts as clipped.
    """
    options: SapoOptions = inputs.options
    advantages_T, log_ratio_T = inputs.advantages_T, inputs.log_ratio_T
    positive, negative = advantages_T.new_tensor([options.tau_positive, options.tau_negative])
    tau_T = torch.where(advantages_T > 0, positive, negative)
    # A slope of 0 times that of an infinite exp would be NaN.
    saturated_T = tau_T * (log_ratio_T.detach().exp() - 1.0) > SATURATED
    ratio_T = torch.where(saturated_T, 0.0, log_ratio_T).exp()
    gate_T = torch.where(saturated_T, 1.0, torch.sigmoid(tau_T * (ratio_T - 1.0)))
    value_T = 4.0 / tau_T * gate_T * advantages_T
    return Objective(inputs.sequence_mean(value_T), torch.zeros_like(inputs.segments.lengths_N))


SPEC = Algorithm(name="sapo", objective=sapo, clips=None, options=SapoOptions)
