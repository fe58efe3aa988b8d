"""KL(pi || pi_ref) to a reference policy, estimated on the sampled tokens (J. Schulman, "Approximating KL divergence").

With r = log pi(y) - log pi_ref(y) on tokens y that pi sampled, the estimates are k1 = r, k2 = r^2 / 2 and
k3 = exp(-r) - 1 + r. k1 and k3 have KL(pi || pi_ref) as their mean. As losses (2510.01555; `k3_unbiased` is that of
2512.02556, with w = pi / pi_old of a token, which also holds for tokens that pi_old sampled):

| estimate | its gradient | on average |
|---|---|---|
| k1 | grad log pi | zero: no penalty, only noise, so `k1` here takes k2's gradient instead |
| k2 | r grad log pi | the gradient of KL(pi || pi_ref) |
| k3 | (1 - pi_ref/pi) grad log pi | the gradient of KL(pi_ref || pi); equal to k2's near r = 0, bounded for r > 0 |
| k3_unbiased = w k3 | w r grad log pi | the gradient of KL(pi || pi_ref), though pi_old sampled |

Shape letters: T tokens of a pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gspo_moe.algorithms.ratios import weighted


@dataclass(frozen=True)
class KLPenalty:
    """coeff times the KL to a reference. reference_log_probs: floats [T] in nats. estimator: one of `ESTIMATORS`."""

    reference_log_probs: torch.Tensor
    coeff: float
    estimator: str

    def estimate(self, log_ratio_T: torch.Tensor, from_old_T: torch.Tensor) -> torch.Tensor:
        """The estimate [T] with the gradient of the table above; log_ratio_T: r, with gradient; from_old_T: log w."""
        return ESTIMATORS[self.estimator](log_ratio_T, from_old_T)


def _k1(log_ratio: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    frozen = log_ratio.detach()
    return (log_ratio - frozen) * frozen + frozen


def _k2(log_ratio: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.expm1(-log_ratio) + log_ratio


def _k3_unbiased(log_ratio: torch.Tensor, from_old: torch.Tensor) -> torch.Tensor:
    """The product's gradient, w (k3 + 1 - exp(-r)), is w r."""
    frozen, weight = log_ratio.detach(), from_old.detach().exp()
    return (log_ratio - frozen) * weighted(weight, frozen) + weighted(weight, _k3(frozen, from_old))


ESTIMATORS = {"k1": _k1, "k2": _k2, "k3": _k3, "k3_unbiased": _k3_unbiased}
