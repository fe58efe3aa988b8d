"""Figures of tokens by their lag: steps that the trainer has taken since a token was sampled, -1 off the response.

Shape letters: T tokens of a pack, G lags from 0 to the largest allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from gspo_moe.algorithms.ratios import k3_from_sampler
from gspo_moe.algorithms.statistics import Statistics


def sums_by_lag(values: Mapping[str, torch.Tensor], lag: torch.Tensor, lags: int) -> dict[str, torch.Tensor]:
    """Each of the values [T] added up by lag, float64 [G], and how many there are as `tokens`. lags: G."""
    kept_T = lag >= 0
    index = lag[kept_T]
    nothing_G = torch.zeros(lags, dtype=torch.float64, device=lag.device)
    counted = {"tokens": torch.ones_like(lag, dtype=torch.float64), **values}
    return {name: nothing_G.index_add(0, index, each[kept_T].double()) for name, each in counted.items()}


class LagStatistics(Statistics):
    """Sums by lag of any number of packs."""

    def means(self, name: str) -> dict[int, float]:
        """Of one of the values, by lag, for the lags that tokens have."""
        pairs = zip(self.sums[name].tolist(), self.sums["tokens"].tolist(), strict=True)
        return {lag: total / tokens for lag, (total, tokens) in enumerate(pairs) if tokens}

    def to_metrics(self) -> dict[str, float]:
        return {f"{name}/lag_{lag}": v for name in self.sums if name != "tokens" for lag, v in self.means(name).items()}


class MismatchByLag(LagStatistics):
    """Log-ratios of any number of packs."""

    def to_metrics(self) -> dict[str, float]:
        """k3, share with max(p/q, q/p) > 2, and the standard deviation (ddof 0) of d, each by lag."""
        mean, squared = self.means("log_ratio"), self.means("squared")
        found = {"k3": self.means("k3"), "token_ratio_above_2": self.means("above_2")}
        found["log_ratio_std"] = {lag: math.sqrt(max(squared[lag] - mean[lag] ** 2, 0.0)) for lag in mean}
        return {f"mismatch/{name}/lag_{lag}": value for name, each in found.items() for lag, value in each.items()}


@torch.no_grad()
def mismatch_by_lag(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, lag: torch.Tensor, lags: int
) -> MismatchByLag:
    """Statistics of d = log_probs - rollout_log_probs, the policy that a step begins with over the one that sampled.

    log_probs, rollout_log_probs: floats [T] in nats; lag: int64 [T]. At lag 0 d is what two engines make of equal
    weights; at lag k what k steps have moved comes on top.
    """
    d_T = torch.where(lag >= 0, log_probs.double() - rollout_log_probs.double(), 0.0)
    above_2_T = d_T.abs() > math.log(2.0)
    values = {"k3": k3_from_sampler(d_T), "above_2": above_2_T, "log_ratio": d_T, "squared": d_T.square()}
    return MismatchByLag(sums_by_lag(values, lag, lags), {})
