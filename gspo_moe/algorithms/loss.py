"""The policy losses of SPEC section 1 behind one call. Shape letters: T tokens of a pack, N sequences of it.

Under context parallelism T is this rank's part of the pack; see `ratios`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from gspo_moe.algorithms.grpo import grpo
from gspo_moe.algorithms.gspo import gspo, gspo_token
from gspo_moe.algorithms.ratios import Objective, Segments, SumOverContext, k3, log_ratios, whole_sequences
from gspo_moe.algorithms.statistics import Statistics, spread, spread_metrics
from gspo_moe.config.schema import SEQUENCE_LEVEL, WIDE_CLIP
from gspo_moe.errors import ConfigError, DataError

# (log_ratio_T, advantages, segments, clip_low, clip_high) to J_i, as `gspo` defines it.
ObjectiveFunction = Callable[[torch.Tensor, torch.Tensor, Segments, float, float], Objective]

OBJECTIVES: dict[str, ObjectiveFunction] = {"gspo": gspo, "gspo_token": gspo_token, "grpo": grpo}


class PolicyStatistics(Statistics):
    """Loss, clip fractions, ratios and KL of any number of packs."""

    @classmethod
    @torch.no_grad()
    def of_pack(cls, log_ratio_T: torch.Tensor, objective: Objective, segments: Segments) -> PolicyStatistics:
        """log_ratio_T: float64, d of `log_ratios`."""
        share_N = segments.share_N
        token_sums, token_maxima = spread("token", log_ratio_T, segments.response_T.double())
        sequence_sums, sequence_maxima = spread("sequence", segments.mean(log_ratio_T), share_N)
        sums = {
            "tokens": segments.response_T.double().sum(),
            "sequences": share_N.sum(),
            "objective": (share_N * objective.value_N).sum(),
            "clipped_tokens": (share_N * objective.clipped_tokens_N).sum(),
            "clipped_sequences": (share_N * (objective.clipped_tokens_N > 0)).sum(),
            "k3": k3(log_ratio_T).sum(),
        }
        return cls({**sums, **token_sums, **sequence_sums}, {**token_maxima, **sequence_maxima})

    def to_metrics(self) -> dict[str, float]:
        """Clip fractions of SPEC section 1; `kl/old_k3` is the mean over response tokens; `loss/policy` is
        -1/n sum_i J_i over the n sequences merged so far, whatever `num_sequences` the losses were scaled by."""
        tokens, sequences = self.sums["tokens"].item(), self.sums["sequences"].item()
        return {
            "loss/policy": -self.sums["objective"].item() / sequences,
            "clip_fraction/sequence": self.sums["clipped_sequences"].item() / sequences,
            "clip_fraction/token": self.sums["clipped_tokens"].item() / tokens,
            "kl/old_k3": self.sums["k3"].item() / tokens,
            **spread_metrics("token", "ratio/token", self, tokens),
            **spread_metrics("sequence", "ratio/sequence", self, sequences),
        }


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar with graph, in the dtype of `log_probs`, the whole pack's on every context-parallel rank.

    sums: its mergeable statistics, detached; those of all ranks together count every token and sequence once.
    """

    loss: torch.Tensor
    sums: PolicyStatistics

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of this pack alone; waits for the device."""
        return self.sums.to_metrics()


def policy_loss(
    algorithm: str,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    allow_wide_clip: bool = False,
    num_sequences: int | None = None,
    sum_over_context: SumOverContext = whole_sequences,
    objective: ObjectiveFunction | None = None,
) -> PolicyLoss:
    """The loss of one pack, -1/num_sequences sum_i J_i, with J_i of `gspo`, `gspo_token` or `grpo`.

    log_probs, old_log_probs: floats [T] in nats, gradient to the first only. advantages: floats [N]; for gspo_token
    also one a token, [T], unless sequences are split over ranks. cu_seqlens: int [N + 1], bounds of the sequences in
    T. response_mask: [T], 0 or 1.
    num_sequences: sequences of the whole mini-batch over all micro-batches and ranks, default N; with it, losses and
    gradients of the parts of a mini-batch add up to the mini-batch's own.
    sum_over_context: adds [N] over the ranks that share the sequences, each of which calls with its own tokens and with
    the same advantages; a sequence may have no response token, or no token, on some of them. Each rank's gradient is
    that of the unsplit pack for its tokens.
    objective: another way to the same J_i, such as a fused kernel; default the algorithm's own module.

    Raises ConfigError for an unknown algorithm and a clip that cannot work; DataError for shapes that do not fit, a
    sequence without response token, and num_sequences below N. Source: arXiv 2507.18071; 2402.03300 for grpo.
    """
    _check_options(algorithm, clip_low, clip_high, allow_wide_clip)
    segments = Segments.of_pack(cu_seqlens, response_mask, sum_over_context)
    log_ratio_T = log_ratios(log_probs, old_log_probs, segments)
    _check_advantages(algorithm, advantages, segments)
    local_sequences = segments.lengths_N.numel()
    if num_sequences is None:
        num_sequences = local_sequences
    elif num_sequences < local_sequences:
        raise DataError(
            f"num_sequences={num_sequences} is less than the {local_sequences} sequences of this pack; "
            "pass the mini-batch's count over all micro-batches and ranks"
        )
    compute = OBJECTIVES[algorithm] if objective is None else objective
    found = compute(log_ratio_T, advantages.detach().double(), segments, clip_low, clip_high)
    loss = -found.value_N.sum() / num_sequences
    return PolicyLoss(loss.to(log_probs.dtype), PolicyStatistics.of_pack(log_ratio_T, found, segments))


def _check_options(algorithm: str, clip_low: float, clip_high: float, allow_wide_clip: bool) -> None:
    if algorithm not in OBJECTIVES:
        (nearest,) = get_close_matches(algorithm, OBJECTIVES, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown algorithm {algorithm!r}; did you mean {nearest!r}? Known are {', '.join(OBJECTIVES)}"
        )
    if not (clip_low >= 0 and clip_high >= 0):
        raise ConfigError(f"clip_low={clip_low} and clip_high={clip_high} must be 0 or more")
    if algorithm in SEQUENCE_LEVEL and max(clip_low, clip_high) >= WIDE_CLIP and not allow_wide_clip:
        raise ConfigError(
            f"a clip of {max(clip_low, clip_high):g} switches clipping off for the sequence ratio of {algorithm} "
            f"(the paper uses 3e-4 and 4e-4); lower clip_low and clip_high below {WIDE_CLIP:g} "
            "or set allow_wide_clip: true"
        )


def _check_advantages(algorithm: str, advantages: torch.Tensor, segments: Segments) -> None:
    shapes = {"[N]": segments.lengths_N.shape}
    if algorithm == "gspo_token" and segments.sum_over_context is whole_sequences:
        shapes["[T]"] = segments.sequence_T.shape
    if advantages.shape not in shapes.values():
        fitting = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes.items())
        raise DataError(f"advantages of {algorithm} must have shape {fitting}, got {list(advantages.shape)}")
