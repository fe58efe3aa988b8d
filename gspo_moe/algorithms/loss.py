"""The policy losses of SPEC section 1 behind one call. Shape letters: T tokens of a pack, N sequences of it.

Under context parallelism T is this rank's part of the pack; see `ratios`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

import torch

from gspo_moe.algorithms.cispo import cispo
from gspo_moe.algorithms.dapo import dapo
from gspo_moe.algorithms.dr_grpo import dr_grpo
from gspo_moe.algorithms.gmpo import gmpo
from gspo_moe.algorithms.grpo import grpo
from gspo_moe.algorithms.gspo import gspo, gspo_token
from gspo_moe.algorithms.kl import KLPenalty
from gspo_moe.algorithms.mismatch import Correction
from gspo_moe.algorithms.ppo import ppo
from gspo_moe.algorithms.ratios import (
    LossInputs,
    Objective,
    Segments,
    SumOverContext,
    k3_from_sampler,
    log_ratios,
    on_response,
    weighted,
    whole_sequences,
)
from gspo_moe.algorithms.rspo import SMALLEST_SHIFT, rspo
from gspo_moe.algorithms.statistics import Parts, Statistics, spread, spread_metrics
from gspo_moe.algorithms.value import value_metrics
from gspo_moe.config.clips import TOKEN_MEAN, WHOLE_SEQUENCES, clip_fault
from gspo_moe.errors import ConfigError, DataError

Count = TypeVar("Count", int, float)

# (what the loss sees) to J_i, as the module of that name defines it.
ObjectiveFunction = Callable[[LossInputs], Objective]

OBJECTIVES: dict[str, ObjectiveFunction] = {
    "gspo": gspo,
    "gspo_token": gspo_token,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "cispo": cispo,
    "gmpo": gmpo,
    "rspo": rspo,
    "ppo": ppo,
}
# How a penalty on tokens is averaged: as the loss averages its own tokens.
AVERAGES = {**dict.fromkeys(TOKEN_MEAN, LossInputs.token_mean), "dr_grpo": LossInputs.fixed_mean}


class PolicyStatistics(Statistics):
    """Loss, clip fractions and ratios of any number of packs; KL, router shift and values, all with or all without."""

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
            "objective": weighted(objective.value_N, share_N).sum(),
            "clipped_tokens": (share_N * objective.clipped_tokens_N).sum(),
            "clipped_sequences": (share_N * (objective.clipped_tokens_N > 0)).sum(),
            "k3": k3_from_sampler(log_ratio_T).sum(),
        }
        return cls({**sums, **token_sums, **sequence_sums}, {**token_maxima, **sequence_maxima})

    def to_metrics(self) -> dict[str, float]:
        """Clip fractions of SPEC section 1; `kl/old_k3`, of KL(old || policy), is the mean over response tokens.

        `loss/policy` is -1/n sum_i J_i over the n sequences merged so far, whatever `num_sequences` the losses were
        scaled by.
        """
        tokens, sequences = self.sums["tokens"].item(), self.sums["sequences"].item()
        metrics = {
            "loss/policy": -self.sums["objective"].item() / sequences,
            "clip_fraction/sequence": self.sums["clipped_sequences"].item() / sequences,
            "clip_fraction/token": self.sums["clipped_tokens"].item() / tokens,
            "kl/old_k3": self.sums["k3"].item() / tokens,
            **spread_metrics("token", "ratio/token", self, tokens),
            **spread_metrics("sequence", "ratio/sequence", self, sequences),
        }
        if "kl_tokens" in self.sums:
            metrics["kl/reference"] = self.sums["kl_tokens"].item() / tokens
            metrics["loss/kl"] = self.sums["kl_penalty"].item() / sequences
        if "router_shift" in self.sums:
            metrics["router_shift/mean"] = self.sums["router_shift"].item() / tokens
            metrics["router_shift/floored"] = self.sums["floored_tokens"].item() / tokens
        if "value_loss" in self.sums:
            metrics |= value_metrics(self.sums, tokens)
        return metrics

    def with_values(self, sums: Parts) -> PolicyStatistics:
        """The same with the sums of `value_loss` of the same packs."""
        return PolicyStatistics({**self.sums, **sums}, self.maxima)

    @torch.no_grad()
    def with_reference(self, kl_T: torch.Tensor, penalty_N: torch.Tensor, segments: Segments) -> PolicyStatistics:
        """The same with the KL to a reference: its estimate on each token, 0 off the response, and what it costs."""
        found = {"kl_tokens": kl_T.sum(), "kl_penalty": weighted(penalty_N, segments.share_N).sum()}
        return PolicyStatistics({**self.sums, **found}, self.maxima)

    @torch.no_grad()
    def with_router_shift(self, shift_T: torch.Tensor, segments: Segments) -> PolicyStatistics:
        """The same with the router shift of response tokens, and how many of them rspo's floor holds up."""
        kept_T = shift_T[segments.response_T]
        found = {"router_shift": kept_T.sum(), "floored_tokens": (kept_T < SMALLEST_SHIFT).double().sum()}
        return PolicyStatistics({**self.sums, **found}, self.maxima)


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
    num_tokens: float | None = None,
    max_response_tokens: int | None = None,
    router_shift: torch.Tensor | None = None,
    correction: Correction | None = None,
    kl: KLPenalty | None = None,
    sum_over_context: SumOverContext = whole_sequences,
    objective: ObjectiveFunction | None = None,
) -> PolicyLoss:
    """The loss of one pack, -1/num_sequences sum_i J_i, with J_i as the module of that name defines it.

    log_probs, old_log_probs: floats [T] in nats, gradient to the first only. advantages: floats [N]; for gspo_token
    also one a token, [T], unless sequences are split over ranks; for ppo always [T].
    cu_seqlens: int [N + 1], bounds of the sequences in T. response_mask: [T], 0 or 1.
    num_sequences, num_tokens: sequences and response tokens of the whole mini-batch over all micro-batches and ranks,
    default the pack's own; with them, losses and gradients of the parts of a mini-batch add up to the mini-batch's own.
    Losses that average over tokens need num_tokens beside num_sequences, the others no num_tokens alone.
    max_response_tokens: the length limit of generation; dr_grpo needs it.
    router_shift: floats [T], gamma of SPEC section 4; rspo needs it.
    correction: weights against the mismatch between rollout engine and trainer.
    kl: adds coeff times the KL to a reference, averaged over tokens as the loss averages its own.
    sum_over_context: adds [N] over the ranks that share the sequences, each of which calls with its own tokens and with
    the same advantages; a sequence may have no response token, or no token, on some of them. Each rank's gradient is
    that of the unsplit pack for its tokens.
    objective: another way to the same J_i, such as a fused kernel; default the algorithm's own module.

    Raises ConfigError for an unknown algorithm, a clip that cannot work, and what the algorithm needs and did not get;
    DataError for shapes that do not fit, a sequence without response token, advantages of response tokens that are not
    finite, and counts below the pack's own.
    """
    _check_options(algorithm, clip_low, clip_high, allow_wide_clip, max_response_tokens, router_shift, correction)
    _check_counts_are_of_one_mini_batch(algorithm, num_sequences, num_tokens)
    segments = Segments.of_pack(cu_seqlens, response_mask, sum_over_context)
    log_ratio_T = log_ratios(log_probs, old_log_probs, segments)
    advantages_N, advantages_T = _advantages(algorithm, advantages, segments, correction)
    sequences_here, tokens_here = segments.lengths_N.numel(), segments.lengths_N.sum().item()
    inputs = LossInputs(
        log_probs_T=on_response(log_probs, segments),
        log_ratio_T=log_ratio_T,
        advantages_N=advantages_N,
        advantages_T=advantages_T,
        segments=segments,
        clip_low=clip_low,
        clip_high=clip_high,
        num_sequences=_count("num_sequences", num_sequences, sequences_here),
        num_tokens=_count("num_tokens", num_tokens, tokens_here),
        max_response_tokens=max_response_tokens or 0,
        router_shift_T=None if router_shift is None else on_response(router_shift, segments, fill=1.0),
    )
    found = (objective or OBJECTIVES[algorithm])(inputs)
    loss = -found.value_N.sum() / inputs.num_sequences
    sums = PolicyStatistics.of_pack(log_ratio_T, found, segments)
    if inputs.router_shift_T is not None:
        sums = sums.with_router_shift(inputs.router_shift_T, segments)
    if kl is not None:
        kl_T = kl.estimate(log_ratios(log_probs, kl.reference_log_probs, segments))
        penalty_N = kl.coeff * AVERAGES.get(algorithm, LossInputs.sequence_mean)(inputs, kl_T)
        loss = loss + penalty_N.sum() / inputs.num_sequences
        sums = sums.with_reference(kl_T, penalty_N, segments)
    return PolicyLoss(loss.to(log_probs.dtype), sums)


def _check_options(
    algorithm: str,
    clip_low: float,
    clip_high: float,
    allow_wide_clip: bool,
    max_response_tokens: int | None,
    router_shift: torch.Tensor | None,
    correction: Correction | None,
) -> None:
    if algorithm not in OBJECTIVES:
        (nearest,) = get_close_matches(algorithm, OBJECTIVES, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown algorithm {algorithm!r}; did you mean {nearest!r}? Known are {', '.join(OBJECTIVES)}"
        )
    if not (clip_low >= 0 and clip_high >= 0):
        raise ConfigError(f"clip_low={clip_low} and clip_high={clip_high} must be 0 or more")
    fault = clip_fault(algorithm, clip_low, clip_high, allow_wide_clip)
    if fault:
        raise ConfigError(fault)
    if algorithm == "dr_grpo" and not max_response_tokens:
        raise ConfigError("dr_grpo divides by max_response_tokens; pass the length limit of generation")
    if algorithm == "rspo" and router_shift is None:
        raise ConfigError("rspo weighs tokens by router_shift; pass one a token, or take gmpo")
    if algorithm in WHOLE_SEQUENCES and correction is not None and correction.level == "token":
        raise ConfigError(f"{algorithm} has one term a sequence and no place for token weights; correct by sequence")


def _check_counts_are_of_one_mini_batch(algorithm: str, num_sequences: float | None, num_tokens: float | None) -> None:
    by_token = algorithm in TOKEN_MEAN
    given, missing = ("num_sequences", "num_tokens") if by_token else ("num_tokens", "num_sequences")
    values = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    if values[given] is not None and values[missing] is None:
        raise ConfigError(
            f"{given}={values[given]} without {missing}: {algorithm} divides by the mini-batch's {missing}, in place "
            f"of which each pack would take its own; pass {missing} too, over all micro-batches and ranks"
        )


def _count(name: str, given: Count | None, here: Count) -> Count:
    if given is None:
        return here
    if not here <= given < math.inf:
        raise DataError(
            f"{name}={given} is not a count of at least the pack's own {here:g}; "
            "pass the mini-batch's count over all micro-batches and ranks"
        )
    return given


def _advantages(
    algorithm: str, advantages: torch.Tensor, segments: Segments, correction: Correction | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] and [T] in float64, times the correction's weights: every J_i is linear in them as they are not negative."""
    shapes = {"[N]": segments.lengths_N.shape} if algorithm != "ppo" else {"[T]": segments.sequence_T.shape}
    if algorithm == "gspo_token" and segments.sum_over_context is whole_sequences:
        shapes["[T]"] = segments.sequence_T.shape
    if advantages.shape not in shapes.values():
        fitting = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes.items())
        raise DataError(f"advantages of {algorithm} must have shape {fitting}, got {list(advantages.shape)}")
    exact = advantages.detach().double()
    # [N] first: a rank that holds parts of sequences may have N tokens by chance.
    by_sequence = algorithm != "ppo" and advantages.shape == segments.lengths_N.shape
    _check_finite(exact if by_sequence else on_response(exact, segments))
    advantages_N = exact if by_sequence else segments.mean(exact)
    advantages_T = exact[segments.sequence_T] if by_sequence else on_response(exact, segments)
    if correction is None:
        return advantages_N, advantages_T
    if correction.level == "token":
        return advantages_N, weighted(correction.weights, advantages_T)
    weights_T = correction.weights[segments.sequence_T]
    return weighted(correction.weights, advantages_N), weighted(weights_T, advantages_T)


def _check_finite(advantages: torch.Tensor) -> None:
    finite = advantages.isfinite()
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise DataError(
            f"advantage {index} is {advantages[index].item()}; let the rewards and values that it is made of be finite"
        )
