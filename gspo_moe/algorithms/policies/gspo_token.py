"""GSPO with one term a token, arXiv 2507.18071, section 4.3. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

import torch

from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm


def gspo_token(inputs: LossInputs) -> Objective:
    """J_i = mean_t min(s_it A_it, clip(s_it) A_it) with s_it = sg[s_i] pi(y_it) / sg[pi(y_it)], section 4.3.

    A_it is A_i unless the advantages are one a token.
    """
    segments, frozen_T = inputs.segments, inputs.log_ratio_T.detach()
    # 0 with the gradient of log pi; the difference of infinities would be NaN.
    zero_T = torch.where(frozen_T.isfinite(), inputs.log_ratio_T - frozen_T, 0.0)
    mean_T = segments.mean(frozen_T)[segments.sequence_T] + zero_T
    value_T, clipped_T = inputs.clip(mean_T, inputs.advantages_T)
    return Objective(inputs.sequence_mean(value_T), segments.sum(clipped_T.double()))


SPEC = Algorithm(
    name="gspo_token",
    objective=gspo_token,
    clips=(3e-4, 4e-4),
    ratio="sequence",
    token_advantages=True,
    dual_clip=True,
    fused="token",
)
