"""How far the rollout engine's log-probs lie from the trainer's at equal weights (SPEC section 3), and corrections.

Shape letters: T tokens of a pack (under context parallelism, of this rank's part of it), N sequences of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gspo_moe.algorithms.ratios import Segments, k3_from_sampler, log_ratios, weighted
from gspo_moe.algorithms.statistics import Statistics, spread, spread_metrics


class MismatchStatistics(Statistics):
    """Mismatch figures of any number of packs."""

    def to_metrics(self) -> dict[str, float]:
        """Means over response tokens, and the sequence ratio's mean, std (ddof 0) and extremes over sequences."""
        tokens, sequences = self.sums["tokens"].item(), self.sums["sequences"].item()
        return {
            "mismatch/k3": self.sums["k3"].item() / tokens,
            "mismatch/token_ratio_above_2": self.sums["tokens_above_2"].item() / tokens,
            **spread_metrics("sequence", "mismatch/sequence_ratio", self, sequences),
        }


@torch.no_grad()
def mismatch(log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, segments: Segments) -> MismatchStatistics:
    """Statistics of d = log_probs - rollout_log_probs, trainer over rollout.

    log_probs, rollout_log_probs: floats [T] in nats.
    Figures: mean exp(d) - 1 - d, the k3 estimate of KL(rollout || trainer) on tokens that the engine sampled; share of
    tokens with max(p/q, q/p) > 2; sequence ratios exp(mean_t d), which, unlike exp(sum_t d), keep their scale on long
    responses. Raises DataError for shapes that do not fit.
    """
    log_ratio_T = log_ratios(log_probs, rollout_log_probs, segments)
    sequence_sums, sequence_maxima = spread("sequence", segments.mean(log_ratio_T), segments.share_N)
    sums = {
        "tokens": segments.response_T.double().sum(),
        "sequences": segments.share_N.sum(),
        "k3": k3_from_sampler(log_ratio_T).sum(),
        "tokens_above_2": (log_ratio_T.abs() > math.log(2.0)).double().sum(),
    }
    return MismatchStatistics({**sums, **sequence_sums}, sequence_maxima)


@dataclass(frozen=True)
class Correction:
    """Weights that make up for sampling from the engine: detached float64, [T] (`token`) or [N] (`sequence`)."""

    level: str
    weights: torch.Tensor


class CorrectionStatistics(Statistics):
    """Weights of any number of packs."""

    def to_metrics(self) -> dict[str, float]:
        """Means over response tokens or over sequences, whichever the weights belong to."""
        count = self.sums["count"].item()
        return {
            "mismatch/weight_mean": self.sums["weight"].item() / count,
            "mismatch/weight_cut": self.sums["cut"].item() / count,
        }


@torch.no_grad()
def correct(
    kind: str,
    level: str,
    bounds: tuple[float, float],
    log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    segments: Segments,
) -> tuple[Correction, CorrectionStatistics]:
    """Weights from w = exp(d), or by sequence s = exp(mean_t d), d = log_probs - rollout_log_probs at equal weights.

    The mean, not the sum: exp(sum_t d) vanishes or explodes with the length of a response.
    kind: `tis` truncates, min(w, high) (F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"); `mask` keeps w in [low, high] and gives 0 outside (IcePop, 2510.18855); `geo_mask`, by token, keeps w as
    it is in sequences with s in [low, high] and gives 0 in others (2512.23075 masks whole sequences; by s as NeMo-RL's
    seq-mask-tis). bounds: low, high.
    Denominators of the loss stay as they are: a masked token or sequence counts in them with nothing.
    Other arguments and errors as for `mismatch`.
    """
    log_ratio_T = log_ratios(log_probs, rollout_log_probs, segments)
    mean_N = segments.mean(log_ratio_T).exp()
    ratio = log_ratio_T.exp() if level == "token" else mean_N
    counted = segments.response_T.double() if level == "token" else segments.share_N
    low, high = bounds
    bounded = mean_N[segments.sequence_T] if kind == "geo_mask" else ratio
    cut = bounded > high if kind == "tis" else (bounded < low) | (bounded > high)
    weights = ratio.clamp(max=high) if kind == "tis" else ratio.masked_fill(cut, 0.0)
    sums = {"count": counted.sum(), "weight": weighted(weights, counted).sum(), "cut": (counted * cut).sum()}
    return Correction(level, weights), CorrectionStatistics(sums, {})
