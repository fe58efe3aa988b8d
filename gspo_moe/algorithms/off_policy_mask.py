"""Off-policy sequence masking of DeepSeek-V3.2, arXiv 2512.02556, equation 9, for any loss.

Shape letters: T tokens of a pack (under context parallelism, of this rank's part of it), N sequences of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gspo_moe.algorithms.ratios import Segments, log_ratios


@dataclass(frozen=True)
class OffPolicyMask:
    """Takes the terms of negative advantage out of the objective, denominators as they were, where `far` says so.

    sampled_log_probs: floats [T] in nats, those that the rollout engine gave, as in the paper: staleness counts, and so
    does the mismatch between engine and trainer. delta: in nats; the paper prints no value.
    """

    sampled_log_probs: torch.Tensor
    delta: float

    @torch.no_grad()
    def far(self, log_probs: torch.Tensor, segments: Segments) -> torch.Tensor:
        """bool [N]: whether mean_t log(pi_sampled / pi) > delta. Raises DataError for shapes that do not fit."""
        return -segments.mean(log_ratios(log_probs, self.sampled_log_probs, segments)) > self.delta
