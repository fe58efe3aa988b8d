"""Importance ratios of packed sequences: which token belongs to which, sums and means over responses, clipping.

Under context parallelism a rank holds some tokens of every sequence. Sums over a sequence then go over the ranks of the
context-parallel group as well, so each rank knows the whole sequence's ratio and the gradient for its own tokens.

Shape letters: T tokens of a pack (of this rank's part of it), N sequences of it. All arithmetic is float64: a GSPO clip
of 3e-4 leaves no room for the rounding of a float32 sum over thousands of tokens, and T numbers cost nothing next to a
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from gspo_moe.errors import DataError

# [N] in, the sum over the ranks that share the sequences out, on each of them; the gradient passes unchanged.
SumOverContext = Callable[[torch.Tensor], torch.Tensor]


def whole_sequences(values_N: torch.Tensor) -> torch.Tensor:
    """The sum over ranks where each sequence lies on one rank."""
    return values_N


@dataclass(frozen=True)
class Segments:
    """The sequences of one pack.

    sequence_T: int64, the index in N of each token's sequence.
    response_T: bool, True on response tokens.
    lengths_N: float64, response tokens |y_i| of the whole sequence, at least 1.
    share_N: float64, the part of them that this rank holds. What is counted a sequence is weighted by it, so that
        statistics, added up over ranks, count each sequence once.
    """

    sequence_T: torch.Tensor
    response_T: torch.Tensor
    lengths_N: torch.Tensor
    share_N: torch.Tensor
    sum_over_context: SumOverContext

    @classmethod
    def of_pack(
        cls,
        cu_seqlens: torch.Tensor,
        response_mask: torch.Tensor,
        sum_over_context: SumOverContext = whole_sequences,
    ) -> Segments:
        """Segments of a pack; waits for the device once, to check them.

        cu_seqlens: int [N + 1], bounds of the sequences in T; response_mask: [T], bool or any number type, 0 or 1.
        Under context parallelism both are of this rank's tokens, and N is the same on every rank.
        Raises DataError for bounds that do not cover T, other mask values, and a sequence without response token.
        """
        if response_mask.ndim != 1 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise DataError(
                f"a pack needs integer cu_seqlens [N + 1] with N >= 1 and response_mask [T], got {cu_seqlens.dtype} "
                f"{list(cu_seqlens.shape)} and {list(response_mask.shape)}; flatten the pack to one dimension"
            )
        num_tokens, num_sequences = response_mask.numel(), cu_seqlens.numel() - 1
        positions_T = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        # Bounds that end early put tokens into an extra last segment: no index leaves the range before the check.
        sequence_T = torch.searchsorted(cu_seqlens[1:], positions_T, right=True)
        response_T = response_mask != 0
        counts = torch.zeros(num_sequences + 1, dtype=torch.float64, device=cu_seqlens.device)
        local_N = counts.index_add(0, sequence_T, response_T.double())[:num_sequences]
        lengths_N = sum_over_context(local_N)
        _check_pack(cu_seqlens, response_mask, lengths_N)
        return cls(sequence_T, response_T, lengths_N, local_N / lengths_N, sum_over_context)

    def sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N] sums over each whole sequence's response tokens, with gradient to this rank's."""
        kept_T = torch.where(self.response_T, values_T, 0.0)
        return self.sum_over_context(kept_T.new_zeros(self.lengths_N.shape).index_add(0, self.sequence_T, kept_T))

    def mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N] means over each whole sequence's response tokens, with gradient to this rank's."""
        return self.sum(values_T) / self.lengths_N


def _check_pack(cu_seqlens: torch.Tensor, response_mask: torch.Tensor, lengths_N: torch.Tensor) -> None:
    num_tokens = response_mask.numel()
    faults = [
        (cu_seqlens[0] != 0) | (cu_seqlens[-1] != num_tokens) | (cu_seqlens.diff() < 0).any(),
        ((response_mask != 0) & (response_mask != 1)).any(),
        (lengths_N == 0).any(),
    ]
    wrong_bounds, wrong_mask, empty_response = torch.stack(faults).tolist()
    if wrong_bounds:
        raise DataError(
            f"cu_seqlens must rise from 0 to the pack's {num_tokens} tokens, got {cu_seqlens.tolist()}; "
            "pass the bounds of the pack that the other tensors come from"
        )
    if wrong_mask:
        raise DataError("response_mask holds values other than 0 and 1; weigh sequences through their advantages")
    if empty_response:
        index = int((lengths_N == 0).nonzero()[0])
        raise DataError(f"sequence {index} of the pack has no response token; drop it when packing")


def log_ratios(log_probs: torch.Tensor, old_log_probs: torch.Tensor, segments: Segments) -> torch.Tensor:
    """d_T = log_probs - old_log_probs on response tokens and 0 elsewhere; float64 [T], gradient to `log_probs` only.

    log_probs, old_log_probs: floats [T] in nats; what they hold off the response, NaN included, has no effect.
    Raises DataError for shapes other than the pack's.
    """
    num_tokens = segments.sequence_T.shape
    if log_probs.shape != num_tokens or old_log_probs.shape != num_tokens:
        raise DataError(
            f"log_probs {list(log_probs.shape)} and old log_probs {list(old_log_probs.shape)} must both have the "
            f"response_mask's shape {list(num_tokens)}; score the same pack twice"
        )
    return torch.where(segments.response_T, log_probs.double() - old_log_probs.detach().double(), 0.0)


def on_response(values: torch.Tensor, segments: Segments, fill: float = 0.0) -> torch.Tensor:
    """Values [T] on response tokens and `fill` elsewhere, float64. Raises DataError for a shape that does not fit."""
    if values.shape != segments.sequence_T.shape:
        raise DataError(
            f"got {list(values.shape)} values for a pack of {list(segments.sequence_T.shape)} tokens; give one a token"
        )
    return torch.where(segments.response_T, values.double(), fill)


def k3_from_sampler(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d, elementwise: the k3 estimate of KL(q || p), d = log p - log q of tokens that q sampled.

    Never negative, its mean is the KL (J. Schulman, "Approximating KL divergence"). The KL of a policy to a reference,
    of tokens that the policy samples, is another: see `kl`.
    """
    return torch.where(log_ratio == torch.inf, torch.inf, torch.expm1(log_ratio) - log_ratio)


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss sees of one pack.

    log_probs_T, log_ratio_T: float64 with gradient, log pi and d; 0 off the response.
    advantages_N, advantages_T: float64, by sequence, for losses of whole sequences, and by token, for the others.
    clip_low, clip_high: ratios are bounded by 1 - clip_low and 1 + clip_high; infinite where nothing is clipped.
    num_sequences, num_tokens: sequences and response tokens of the whole mini-batch over all micro-batches and ranks.
    max_response_tokens: the length limit of generation.
    options: the algorithm's own keys, an instance of its `options`.
    router_shift_T: float64, gamma of SPEC section 4, 1 off the response, for algorithms that need it.
    dual_clip: as `clip` takes it; infinite where nothing bounds that side.
    """

    log_probs_T: torch.Tensor
    log_ratio_T: torch.Tensor
    advantages_N: torch.Tensor
    advantages_T: torch.Tensor
    segments: Segments
    clip_low: float
    clip_high: float
    num_sequences: int
    num_tokens: float
    max_response_tokens: int
    options: Any = None
    router_shift_T: torch.Tensor | None = None
    dual_clip: float = math.inf

    def clip(self, log_ratio: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`clip` at the bounds of the run."""
        return clip(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)

    def sequence_mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N] whose sum over num_sequences is 1/N sum_i 1/|y_i| sum_t values: every sequence counts the same."""
        return self.segments.mean(values_T)

    def token_mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N] whose sum over num_sequences is the mean over the mini-batch's tokens: every token counts the same."""
        return self.segments.sum(values_T) * (self.num_sequences / self.num_tokens)

    def fixed_mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N] whose sum over num_sequences is 1/N sum_i 1/max_response_tokens sum_t values: no length counts."""
        return self.segments.sum(values_T) / self.max_response_tokens

    def sequence_sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N] whose sum over num_sequences is 1/N sum_i sum_t values: sequences count by their length."""
        return self.segments.sum(values_T)


class Objective(NamedTuple):
    """What a policy loss maximises.

    value_N: float64, J_i with gradient; the loss is -1/N sum_i J_i.
    clipped_tokens_N: float64, response tokens of each whole sequence whose gradient the clip removed.
    token_sums: by metric, float64 sums over the response tokens here, logged as means over tokens. A name of one's own
        is `algorithm/NAME`; every pack has the same ones.
    """

    value_N: torch.Tensor
    clipped_tokens_N: torch.Tensor
    token_sums: Mapping[str, torch.Tensor] = MappingProxyType({})


def clip(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(log_ratio), and a bool of where the min is clipped.

    dual_clip: c of arXiv 1912.09729, equation 3: where A < 0 the value is max(that, c A), clipped where r > c.
    Where r overflows, value and gradient are still those of the formula: 0 for A = 0, no gradient where clipped, and
    infinite for A < 0, which nothing bounds.
    """
    low, high = 1.0 - clip_low, 1.0 + clip_high
    ratio = log_ratio.detach().exp()
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    # exp is kept away from what has no gradient: 0 times its infinite slope is NaN.
    beyond = (advantages < 0) & (ratio > dual_clip)
    active = torch.where(clipped | beyond | (advantages == 0), 0.0, log_ratio).exp()
    bounded = torch.where(clipped, ratio.clamp(low, high), active)
    return torch.where(beyond, dual_clip, bounded) * advantages, clipped | beyond


def weighted(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """values * weights, 0 where a weight is 0, though the value be infinite."""
    return torch.where(weights == 0, 0.0, values) * weights
