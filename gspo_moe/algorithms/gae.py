"""Generalized Advantage Estimation, arXiv 1506.02438, over the response tokens of packed sequences.

The policy's actions are the response tokens, in order; prompt and tool tokens between them take no time. The only
reward is the sequence's, at its last response token, behind which the value is 0, also where the length limit cut it
off.

Shape letters: T tokens of a pack, N sequences of it, K response tokens of the longest one.
"""

from __future__ import annotations

import torch

from gspo_moe.algorithms.ratios import Segments, on_response
from gspo_moe.algorithms.statistics import Mergeable
from gspo_moe.errors import DataError

STD_EPSILON = 1e-8


@torch.no_grad()
def gae(
    values: torch.Tensor, rewards: torch.Tensor, segments: Segments, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, float64 [T], 0 off the response.

    A_k = sum_j (gamma lam)^j delta_(k+j) with delta_k = r_k + gamma V_(k+1) - V_k, equation 16; returns are A + V.
    values: floats [T], V of what stands before each target. rewards: floats [N]. segments: of whole sequences.
    Raises DataError for shapes that do not fit.
    """
    values_T = on_response(values, segments)
    if rewards.shape != segments.lengths_N.shape:
        raise DataError(
            f"got {list(rewards.shape)} rewards for {segments.lengths_N.numel()} sequences; give one for each"
        )
    lengths_N = segments.lengths_N.long()
    row_R = segments.sequence_T[segments.response_T]
    column_R = torch.arange(len(row_R), device=row_R.device) - (lengths_N.cumsum(0) - lengths_N)[row_R]
    shape = (len(lengths_N), int(lengths_N.max()))
    values_NK = values_T.new_zeros(shape).index_put((row_R, column_R), values_T[segments.response_T])
    delta_NK = gamma * torch.nn.functional.pad(values_NK[:, 1:], (0, 1)) - values_NK
    last_N = (torch.arange(shape[0], device=row_R.device), lengths_N - 1)
    delta_NK = delta_NK.index_put(last_N, rewards.double(), accumulate=True)
    advantages_NK = torch.zeros_like(delta_NK)
    following_N = delta_NK.new_zeros(shape[0])
    for column in reversed(range(shape[1])):
        # Columns behind a sequence's last token hold zeros, so that nothing flows back from them.
        following_N = delta_NK[:, column] + gamma * lam * following_N
        advantages_NK[:, column] = following_N
    advantages_T = torch.zeros_like(values_T)
    advantages_T[segments.response_T] = advantages_NK[row_R, column_R]
    return advantages_T, advantages_T + values_T


class StepMeans(Mergeable):
    """Means of advantages and returns over the response tokens of any number of packs."""

    @classmethod
    def of_pack(cls, advantages_T: torch.Tensor, returns_T: torch.Tensor, response_mask: torch.Tensor) -> StepMeans:
        """advantages_T, returns_T: float64, 0 off the response."""
        count = (response_mask != 0).double().sum()
        return cls({"count": count, "advantages": advantages_T.sum(), "returns": returns_T.sum()}, {})

    @property
    def advantage(self) -> torch.Tensor:
        return self.sums["advantages"] / self.sums["count"]

    @property
    def value_return(self) -> torch.Tensor:
        return self.sums["returns"] / self.sums["count"]


class Whitening(Mergeable):
    """Squares about the mean of the advantages of any number of packs.

    The mean comes first, from `StepMeans` of all of them: a difference of raw moments loses the variance where the
    mean is far larger than the deviation.
    """

    @classmethod
    def of_pack(cls, advantages_T: torch.Tensor, response_mask: torch.Tensor, mean: torch.Tensor) -> Whitening:
        """advantages_T: float64 [T]. mean: scalar, of all packs."""
        on_T = response_mask != 0
        return cls({"count": on_T.double().sum(), "squares": (advantages_T - mean)[on_T].square().sum()}, {})

    def whiten(self, advantages_T: torch.Tensor, response_mask: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """(A - mean) / (std + 1e-8) on response tokens, std with ddof 1; float64 [T], 0 elsewhere."""
        whitened_T = (advantages_T - mean) / (self._std() + STD_EPSILON)
        return torch.where(response_mask != 0, whitened_T, 0.0)

    def _std(self) -> torch.Tensor:
        return (self.sums["squares"] / (self.sums["count"] - 1).clamp(min=1)).sqrt()
