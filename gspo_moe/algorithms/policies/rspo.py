"""Router-Shift Policy Optimization, arXiv 2510.23027. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

from gspo_moe.algorithms.policies.gmpo import SPEC as GMPO
from gspo_moe.algorithms.policies.gmpo import geometric_mean
from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm

SMALLEST_SHIFT = 0.8


def rspo(inputs: LossInputs) -> Objective:
    """gmpo on the ratios w_it sg[max(gamma_it, 0.8)]: tokens whose router moved count less.

    gamma_it is the router-shift ratio of SPEC section 4, 1 where the router stands as it did. The floor, like gamma, is
    a constant; the rescaling comes before clip and mean.
    """
    assert inputs.router_shift_T is not None
    shift_T = inputs.router_shift_T.detach()
    found = geometric_mean(inputs.log_ratio_T + shift_T.clamp(min=SMALLEST_SHIFT).log(), inputs)
    floored = (shift_T < SMALLEST_SHIFT).double().sum()
    return found._replace(token_sums={"router_shift/floored": floored})


SPEC = Algorithm(
    name="rspo",
    objective=rspo,
    clips=GMPO.clips,
    terms="sequence",
    router_shift=True,
    instead="algorithm.name=gmpo, which is rspo without that weight",
)
