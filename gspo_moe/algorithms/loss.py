"""The policy losses of SPEC section 1 behind one call. Shape letters: T tokens of a pack, N sequences of it.

Under context parallelism T is this rank's part of the pack; see `ratios`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch

from gspo_moe.algorithms.kl import KLPenalty
from gspo_moe.algorithms.off_policy_mask import OffPolicyMask
from gspo_moe.algorithms.policy_statistics import PolicyStatistics
from gspo_moe.algorithms.ratios import LossInputs, Segments, log_ratios, on_response, weighted, whole_sequences
from gspo_moe.algorithms.rollout_mismatch import Correction
from gspo_moe.algorithms.spec import Algorithm, clip_fault
from gspo_moe.algorithms.table import find_algorithm
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.section import Section

Count = TypeVar("Count", int, float)

# How a penalty on tokens is averaged: as the loss averages its own tokens.
AVERAGES = {
    "sequence": LossInputs.sequence_mean,
    "token": LossInputs.token_mean,
    "fixed": LossInputs.fixed_mean,
    "sum": LossInputs.sequence_sum,
}


@dataclass(frozen=True)
class Settings:
    """clip_low, clip_high: None for the algorithm's own. options: its own keys, None for their defaults.

    dual_clip: c of `ratios.clip`, None for no bound.
    """

    clip_low: float | None = None
    clip_high: float | None = None
    allow_wide_clip: bool = False
    options: Section | None = None
    dual_clip: float | None = None

    def clips(self, spec: Algorithm) -> tuple[float, float]:
        """Raises ConfigError for clips that cannot work, and for those of a loss that has none."""
        if spec.clips is None:
            if self.clip_low is not None or self.clip_high is not None:
                raise ConfigError(f"{spec.name} clips nothing by clip_low and clip_high; leave both out")
            return math.inf, math.inf
        low, high = spec.clips
        low, high = low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high
        fault = clip_fault(spec, low, high, self.allow_wide_clip)
        if fault:
            raise ConfigError(fault)
        return low, high


@dataclass(frozen=True)
class Counts:
    """Of the mini-batch over all micro-batches and ranks: sequences and response tokens; None for the pack's own.

    With them, losses and gradients of the parts of a mini-batch add up to the mini-batch's own. Losses that average
    over tokens need num_tokens beside num_sequences, the others no num_tokens alone.
    max_response_tokens: the length limit of generation, for losses that divide by it.
    """

    num_sequences: int | None = None
    num_tokens: float | None = None
    max_response_tokens: int | None = None


@dataclass(frozen=True)
class Extras:
    """What a loss may have beside its log-probs.

    router_shift: floats [T], gamma of SPEC section 4. correction: weights against the mismatch between rollout engine
    and trainer. off_policy_mask: drops sequences that the policy has left. kl: adds coeff times the KL to a reference,
    averaged over tokens as the loss averages its own.
    entropy: floats [T], detached, of the policy in nats, which is logged.
    """

    router_shift: torch.Tensor | None = None
    correction: Correction | None = None
    off_policy_mask: OffPolicyMask | None = None
    kl: KLPenalty | None = None
    entropy: torch.Tensor | None = None


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
    algorithm: Algorithm | str,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    segments: Segments,
    settings: Settings = Settings(),
    counts: Counts = Counts(),
    extras: Extras = Extras(),
) -> PolicyLoss:
    """The loss of one pack, -1/num_sequences sum_i J_i, with J_i as the algorithm defines it.

    algorithm: a name as in `algorithm.name`, or the specification itself.
    log_probs, old_log_probs: floats [T] in nats, gradient to the first only. advantages: floats [N]; [T], one a token,
    for an algorithm with a value function, and, where it takes them, unless sequences are split over ranks.
    segments: where each rank holds parts of sequences, each calls with its own tokens and the same advantages; its
    gradient is that of the unsplit pack for its tokens.

    Raises ConfigError for an unknown algorithm, a clip that cannot work, and what the algorithm needs and did not get;
    DataError for shapes that do not fit, advantages of response tokens that are not finite, and counts below the pack's
    own.
    """
    spec = find_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    _check_needs(spec, settings, counts, extras)
    clip_low, clip_high = settings.clips(spec)
    log_ratio_T = log_ratios(log_probs, old_log_probs, segments)
    advantages_N, advantages_T = _advantages(spec, advantages, segments)
    dropped_N, dropped_T = _dropped(advantages_N, advantages_T, log_probs, segments, extras)
    if dropped_N is not None and dropped_T is not None:
        advantages_N, advantages_T = advantages_N.masked_fill(dropped_N, 0.0), advantages_T.masked_fill(dropped_T, 0.0)
    advantages_N, advantages_T = _corrected(advantages_N, advantages_T, segments, extras.correction)
    sequences_here, tokens_here = segments.lengths_N.numel(), segments.lengths_N.sum().item()
    shift = extras.router_shift
    inputs = LossInputs(
        log_probs_T=on_response(log_probs, segments),
        log_ratio_T=log_ratio_T,
        advantages_N=advantages_N,
        advantages_T=advantages_T,
        segments=segments,
        clip_low=clip_low,
        clip_high=clip_high,
        num_sequences=_count("num_sequences", counts.num_sequences, sequences_here),
        num_tokens=_count("num_tokens", counts.num_tokens, tokens_here),
        max_response_tokens=counts.max_response_tokens or 0,
        options=spec.options() if settings.options is None and spec.options is not None else settings.options,
        router_shift_T=None if shift is None else on_response(shift, segments, fill=1.0),
        dual_clip=math.inf if settings.dual_clip is None else settings.dual_clip,
    )
    found = spec.objective(inputs)
    sums = PolicyStatistics.of_pack(log_ratio_T, found, segments)
    for name, values_T in (("router_shift", shift), ("entropy", extras.entropy), ("off_policy_dropped", dropped_T)):
        sums = sums if values_T is None else sums.with_token_sum(name, values_T, segments)
    loss = -found.value_N.sum() / inputs.num_sequences
    if extras.kl is not None:
        kl_T = extras.kl.estimate(log_ratios(log_probs, extras.kl.reference_log_probs, segments), log_ratio_T)
        penalty_N = extras.kl.coeff * AVERAGES[spec.average](inputs, kl_T)
        loss = loss + penalty_N.sum() / inputs.num_sequences
        sums = sums.with_reference(kl_T, penalty_N, segments)
    return PolicyLoss(loss.to(log_probs.dtype), sums)


def _check_needs(spec: Algorithm, settings: Settings, counts: Counts, extras: Extras) -> None:
    if spec.average == "fixed" and not counts.max_response_tokens:
        raise ConfigError(f"{spec.name} divides by max_response_tokens; pass the length limit of generation")
    if settings.dual_clip is not None and not (spec.dual_clip and settings.dual_clip > 1):
        raise ConfigError(
            f"dual_clip={settings.dual_clip} with {spec.name}: it must be above 1, and is for losses of min and clip"
        )
    if spec.router_shift and extras.router_shift is None:
        instead = f", or take {spec.instead.removeprefix('algorithm.name=')}" if spec.instead else ""
        raise ConfigError(f"{spec.name} weighs tokens by router_shift; pass one a token{instead}")
    if spec.terms == "sequence" and extras.correction is not None and extras.correction.level == "token":
        raise ConfigError(f"{spec.name} has one term a sequence and no place for token weights; correct by sequence")
    if spec.whole_ratio and extras.correction is not None:
        raise ConfigError(
            f"{spec.name} takes the whole ratio and no correction beside it; pass the engine's log-probs as old ones"
        )
    given = settings.options
    if given is not None and (spec.options is None or not isinstance(given, spec.options)):
        wanted = "none" if spec.options is None else f"those of {spec.options.__name__}"
        raise ConfigError(f"{spec.name} has other options than {type(given).__name__}; pass {wanted}")
    needed, beside = ("num_tokens", "num_sequences") if spec.average == "token" else ("num_sequences", "num_tokens")
    if getattr(counts, beside) is not None and getattr(counts, needed) is None:
        raise ConfigError(
            f"{beside}={getattr(counts, beside)} without {needed}: {spec.name} divides by the mini-batch's {needed}, "
            f"in place of which each pack would take its own; pass {needed} too, over all micro-batches and ranks"
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


def _advantages(spec: Algorithm, advantages: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] and [T] in float64."""
    shapes = {} if spec.has_value_function else {"[N]": segments.lengths_N.shape}
    if spec.has_value_function or (spec.token_advantages and segments.sum_over_context is whole_sequences):
        shapes["[T]"] = segments.sequence_T.shape
    if advantages.shape not in shapes.values():
        fitting = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes.items())
        raise DataError(f"advantages of {spec.name} must have shape {fitting}, got {list(advantages.shape)}")
    exact = advantages.detach().double()
    # [N] first: a rank that holds parts of sequences may have N tokens by chance.
    by_sequence = not spec.has_value_function and advantages.shape == segments.lengths_N.shape
    _check_finite(exact if by_sequence else on_response(exact, segments))
    advantages_N = exact if by_sequence else segments.mean(exact)
    return advantages_N, exact[segments.sequence_T] if by_sequence else on_response(exact, segments)


def _dropped(
    advantages_N: torch.Tensor, advantages_T: torch.Tensor, log_probs: torch.Tensor, segments: Segments, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Sequences and tokens that the off-policy mask leaves out: of bad answers that are far from the policy."""
    if extras.off_policy_mask is None:
        return None, None
    far_N = extras.off_policy_mask.far(log_probs, segments)
    return far_N & (advantages_N < 0), far_N[segments.sequence_T] & (advantages_T < 0)


def _corrected(
    advantages_N: torch.Tensor, advantages_T: torch.Tensor, segments: Segments, correction: Correction | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Times the correction's weights: every J_i is linear in them as they are not negative."""
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
