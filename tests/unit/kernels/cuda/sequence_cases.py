"""Cases of sequence_reduce, with a float64 reference of SPEC section 1. Shape letters: T tokens, N sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.unit.kernels.cuda.interface import FINISH, PARTIAL, WHOLE, Array, Buffer, Case, Outputs, expect


@dataclass(frozen=True)
class Pack:
    """lengths_N: tokens of each sequence, which mask_T, log_probs_T and old_log_probs_T hold end to end.

    advantages: [N] or, per token, [T].
    """

    lengths_N: Array
    mask_T: Array
    log_probs_T: Array
    old_log_probs_T: Array
    advantages: Array
    per_token: bool = False
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    scale: float = 0.125

    @property
    def bounds(self) -> Array:
        return np.concatenate([[0], np.cumsum(self.lengths_N)]).astype(np.int64)

    def sums(self) -> Array:
        """float64 [N, 2]: sum of log-ratios, count, over response tokens."""
        log_ratio_T = self.log_probs_T.astype(np.float64) - self.old_log_probs_T.astype(np.float64)
        sums = np.zeros((len(self.lengths_N), 2))
        for sequence, (start, end) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            response = self.mask_T[start:end] != 0
            sums[sequence] = log_ratio_T[start:end][response].sum(), response.sum()
        return sums

    def finish(self, sums_N2: Array) -> dict[str, Array]:
        """What the kernel writes, given the sums over whole sequences."""
        num = len(self.lengths_N)
        written = {name: np.zeros(num) for name in ("ratio_N", "loss_N", "clipped_tokens_N")}
        written["grad_log_probs_T"] = np.zeros(len(self.mask_T))
        for sequence, (start, end) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            total, length = sums_N2[sequence]
            with np.errstate(over="ignore"):
                ratio = np.exp(total / length) if length else 1.0
            written["ratio_N"][sequence] = ratio
            if not length:
                continue
            positions = np.arange(start, end)[self.mask_T[start:end] != 0]
            by_token = self.advantages[positions if self.per_token else np.full(len(positions), sequence)]
            active, objective = self.active(ratio, by_token), self.objective(ratio, by_token)
            slope = np.where(active, times(ratio, by_token), 0.0)
            written["grad_log_probs_T"][positions] = -self.scale * slope / length
            if self.per_token:
                written["loss_N"][sequence] = -self.scale * objective.sum() / length
                written["clipped_tokens_N"][sequence] = (~active).sum()
            else:
                advantage = self.advantages[sequence : sequence + 1]
                written["loss_N"][sequence] = -self.scale * self.objective(ratio, advantage)[0]
                written["clipped_tokens_N"][sequence] = 0 if self.active(ratio, advantage)[0] else length
        return written

    def objective(self, ratio: float, advantages: Array) -> Array:
        bounded = np.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        return np.minimum(times(ratio, advantages), times(bounded, advantages))

    def active(self, ratio: float, advantages: Array) -> Array:
        """Where the min follows the ratio."""
        outside = (ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low)
        return ~(outside & (self.objective(ratio, advantages) != times(ratio, advantages)))


def times(ratio: float, advantages: Array) -> Array:
    """Their product, 0 for an advantage of 0 though the ratio be infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(advantages == 0, 0.0, ratio * advantages)


def finite(values: Array) -> Array:
    """Their sizes; infinities, which are exact, give 0."""
    return np.where(np.isfinite(values), np.abs(values), 0.0)


def reduce_case(
    name: str, pack: Pack, phases: int = WHOLE, whole_sums_N2: Array | None = None, num_sms: int = 1
) -> Case:
    """whole_sums_N2: for FINISH, the sums over all ranks."""
    num = len(pack.lengths_N)
    own_sums_N2 = pack.sums()
    given_N2 = np.full((num, 2), 777.0) if phases & PARTIAL else whole_sums_N2
    assert given_N2 is not None

    def check(outputs: Outputs) -> None:
        wanted_N2 = own_sums_N2 if phases & PARTIAL else given_N2
        response_T = np.repeat(np.arange(num), pack.lengths_N)[pack.mask_T != 0]
        size_T = np.abs(pack.log_probs_T.astype(np.float64)) + np.abs(pack.old_log_probs_T.astype(np.float64))
        scale_N = np.bincount(response_T, weights=size_T[pack.mask_T != 0], minlength=num)
        expect(name, "sum", outputs["sums_N2"][:, 0], wanted_N2[:, 0], 1e-13 * scale_N)
        expect(name, "count", outputs["sums_N2"][:, 1], wanted_N2[:, 1], 0)
        if not phases & FINISH:
            return
        wanted = pack.finish(outputs["sums_N2"])
        for what in ("ratio_N", "loss_N", "clipped_tokens_N"):
            expect(name, what, outputs[what], wanted[what], 1e-12 * finite(wanted[what]) + 1e-15)
        gradient = wanted["grad_log_probs_T"]
        expect(name, "gradient", outputs["grad_log_probs_T"], gradient, 1e-7 * finite(gradient) + 1e-37)

    numbers: dict[str, float] = {"phases": phases, "num_sequences": num, "advantages_per_token": int(pack.per_token)}
    numbers |= {"clip_low": pack.clip_low, "clip_high": pack.clip_high, "scale": pack.scale}
    buffers = {
        "cu_seqlens": Buffer(pack.bounds),
        "mask_T": Buffer(pack.mask_T.astype(np.uint8), offset=3),
        "sums_N2": Buffer(given_N2.copy()),
    }
    if phases & PARTIAL:
        buffers["log_probs_T"] = Buffer(pack.log_probs_T, offset=4)
        buffers["old_log_probs_T"] = Buffer(pack.old_log_probs_T, offset=12)
    if phases & FINISH:
        buffers["advantages"] = Buffer(pack.advantages.astype(np.float64), offset=8)
        for what in ("ratio_N", "loss_N", "clipped_tokens_N"):
            buffers[what] = Buffer(np.full(num, 777.0))
        buffers["grad_log_probs_T"] = Buffer(np.full(len(pack.mask_T), 777.0, dtype=np.float32), offset=4)
    return Case(name, "sequence_reduce", numbers, buffers, check, num_sms=num_sms)
