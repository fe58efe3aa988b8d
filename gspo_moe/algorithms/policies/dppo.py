"""Divergence Proximal Policy Optimization, arXiv 2602.04879. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat

from gspo_moe.algorithms.ratios import LossInputs, Objective, weighted
from gspo_moe.algorithms.spec import Algorithm
from gspo_moe.section import Section

DELTAS = {"tv": 0.15, "kl": 0.05}


class DppoOptions(Section):
    """What bounds how far a token's probability moves: total variation or KL, up to `delta`, null for 0.15 and 0.05."""

    divergence: Literal["tv", "kl"] = "tv"
    delta: PositiveFloat | None = None


def dppo(inputs: LossInputs) -> Objective:
    """J = 1 / sum_i |y_i| sum_i sum_t m_it w_it A_it with w_it = exp(d_it).

    m_it = 0, and the token counts as clipped, where the divergence exceeds delta on the side to which A_it pushes: pi >
    mu and A > 0, or pi < mu and A < 0. Divergences are of the two outcomes "this token" and "another one": |pi - mu|,
    or KL(mu || pi). mu is the old policy, the rollout's own log-probs under `old_log_probs: rollout`.
    """
    options: DppoOptions = inputs.options
    delta = DELTAS[options.divergence] if options.delta is None else options.delta
    log_pi_T, frozen_T, advantages_T = inputs.log_probs_T.detach(), inputs.log_ratio_T.detach(), inputs.advantages_T
    log_mu_T = log_pi_T - frozen_T
    pi_T, mu_T = log_pi_T.exp(), log_mu_T.exp()
    if options.divergence == "tv":
        divergence_T = (pi_T - mu_T).abs()
    else:
        other_pi_T, other_mu_T = torch.expm1(log_pi_T).abs(), torch.expm1(log_mu_T).abs()
        divergence_T = weighted(-frozen_T, mu_T) + weighted((other_mu_T / other_pi_T).log(), other_mu_T)
    outward_T = ((advantages_T > 0) & (pi_T > mu_T)) | ((advantages_T < 0) & (pi_T < mu_T))
    dropped_T = outward_T & (divergence_T > delta)
    # exp is kept away from what has no gradient: 0 times its infinite slope is NaN.
    ratio_T = torch.where(dropped_T | (advantages_T == 0), 0.0, inputs.log_ratio_T).exp()
    value_T = torch.where(dropped_T, 0.0, ratio_T * advantages_T)
    return Objective(inputs.token_mean(value_T), inputs.segments.sum(dropped_T.double()))


SPEC = Algorithm(name="dppo", objective=dppo, clips=None, average="token", options=DppoOptions)
