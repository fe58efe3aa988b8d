"""Cases of token_stats and token_backward, with float64 references.

Shape letters: T tokens, V columns of the logits, S statistics a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.unit.kernels.cuda.formats import BYTES, NAMES, ROUNDING, decode, encode
from tests.unit.kernels.cuda.interface import Array, Buffer, Case, Outputs, expect

# Kernels may flush what is smaller to 0.
SUBNORMAL = 1e-37


@dataclass(frozen=True)
class Rows:
    """Logits of one rank as they lie in memory.

    vocab: columns that are tokens; padding: columns after them; gap: elements between rows that belong to nobody;
    shift: elements that the first row starts past a 16-byte boundary; start: the id of the first column.
    """

    logits_TV: Array
    dtype: str
    padding: int = 0
    gap: int = 0
    shift: int = 0
    start: int = 0
    temperature: float = 1.0

    @property
    def tokens(self) -> int:
        return int(self.logits_TV.shape[0])

    @property
    def vocab(self) -> int:
        return int(self.logits_TV.shape[1])

    @property
    def stride(self) -> int:
        return self.vocab + self.padding + self.gap

    @property
    def inverse(self) -> float:
        return float(np.float32(1.0 / self.temperature))

    @property
    def x_TV(self) -> Array:
        """float64 logits over the temperature, of the logits as they are stored."""
        return decode(encode(self.logits_TV, self.dtype), self.dtype) * self.inverse

    def memory(self) -> Buffer:
        """NaN wherever no kernel may look."""
        stored = encode(np.full((self.tokens, self.stride), np.nan), self.dtype)
        stored[:, : self.vocab] = encode(self.logits_TV, self.dtype)
        length = max(0, (self.tokens - 1) * self.stride + self.vocab + self.padding) if self.tokens else 0
        return Buffer(stored.reshape(-1)[:length], self.shift * BYTES[self.dtype], counted=True)

    def numbers(self) -> dict[str, float]:
        return {
            "element_type": NAMES.index(self.dtype),
            "num_tokens": self.tokens,
            "vocab": self.vocab,
            "row_stride": self.stride,
            "vocab_start": self.start,
            "inverse_temperature": self.inverse,
        }


def stats_reference(x_TV: Array, columns_T: Array) -> Array:
    """float64 [T, 4]: max, sum-exp, target, moment; columns_T: the target's column, anything else where it is none."""
    tokens, vocab = x_TV.shape
    max_T = x_TV.max(axis=1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        shifted_TV = np.where(x_TV == -np.inf, -np.inf, x_TV - max_T[:, None])
        weights_TV = np.exp(shifted_TV)
        moment_TV = np.where(x_TV == -np.inf, 0.0, shifted_TV * weights_TV)
    target_T = np.full(tokens, -np.inf)
    here_T = (columns_T >= 0) & (columns_T < vocab)
    target_T[here_T] = x_TV[here_T, columns_T[here_T]]
    return np.stack([max_T, weights_TV.sum(axis=1), target_T, moment_TV.sum(axis=1)], axis=1)


def combine(parts_RTS: Array) -> Array:
    """Statistics of the whole vocabulary from those of R ranks, by the formula in api.h."""
    max_RT, sum_RT, target_RT, moment_RT = np.moveaxis(parts_RTS, -1, 0)
    max_T = max_RT.max(axis=0)
    with np.errstate(invalid="ignore"):
        step_RT = np.where(sum_RT > 0, max_RT - max_T, 0.0)
    scale_RT = np.where(sum_RT > 0, np.exp(step_RT), 0.0)
    sum_T = (sum_RT * scale_RT).sum(axis=0)
    moment_T = ((moment_RT + step_RT * sum_RT) * scale_RT).sum(axis=0)
    return np.stack([max_T, sum_T, target_RT.max(axis=0), moment_T], axis=1)


def stats_tolerance(x_TV: Array, wanted_TS: Array) -> Array:
    """What float32 sums of up to hundreds of terms a thread may be off.

    The second moment bounds what the rounding of exponents does to the first, to which subnormal weights may be 0.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        shifted_TV = np.where(x_TV == -np.inf, 0.0, x_TV - wanted_TS[:, :1])
        weights_TV = np.exp(shifted_TV)
        second_T = (shifted_TV**2 * weights_TV).sum(axis=1)
        flushed_T = np.where(weights_TV < SUBNORMAL, -shifted_TV * weights_TV, 0.0).sum(axis=1)
    max_T, sum_T, target_T, moment_T = np.abs(wanted_TS).T
    tolerance_TS = np.stack(
        [
            2e-7 * max_T,
            1e-5 * sum_T + 2e-7 * moment_T,
            2e-7 * target_T,
            1e-5 * moment_T + 3e-7 * second_T + flushed_T,
        ],
        axis=1,
    )
    return tolerance_TS + SUBNORMAL


def stats_case(
    name: str,
    rows: Rows,
    targets_T: Array,
    entropy: bool = True,
    also: Callable[[Array], None] | None = None,
    num_sms: int = 1,
) -> Case:
    """also: gets the statistics found, float64 [T, S], after they were checked."""
    size = 4 if entropy else 3
    memory = rows.memory()

    def check(outputs: Outputs) -> None:
        x_TV = rows.x_TV
        wanted_TS = stats_reference(x_TV, targets_T - rows.start)
        tolerance_TS = stats_tolerance(x_TV, wanted_TS)
        found_TS = outputs["stats_TS"].astype(np.float64)
        # What NaN or +inf leaves in the maximum is not promised.
        promised_T = np.isfinite(wanted_TS[:, 1])
        expect(name, "sum and moment", found_TS[:, 1::2], wanted_TS[:, 1:size:2], tolerance_TS[:, 1:size:2])
        expect(name, "target", found_TS[:, 2], wanted_TS[:, 2], tolerance_TS[:, 2])
        expect(name, "max", found_TS[promised_T, 0], wanted_TS[promised_T, 0], tolerance_TS[promised_T, 0])
        expect(name, "logits bytes", outputs["logits_TV"].view(np.uint8), memory.data.view(np.uint8), 0)
        if also is not None:
            also(found_TS)

    here = int(((targets_T >= rows.start) & (targets_T < rows.start + rows.vocab)).sum())
    return Case(
        name=name,
        kernel="token_stats",
        numbers={**rows.numbers(), "entropy": int(entropy)},
        buffers={
            "logits_TV": memory,
            "targets_T": Buffer(targets_T.astype(np.int64)),
            "stats_TS": Buffer(np.full((rows.tokens, size), 12345.0, dtype=np.float32)),
        },
        check=check,
        # Every logit once, and the target's once more.
        traffic=((rows.tokens * rows.vocab + here) * BYTES[rows.dtype], 0),
        num_sms=num_sms,
    )


@dataclass(frozen=True)
class Gradients:
    """What arrives for each token: d loss / d log-prob, and d loss / d entropy or None; float32 [T]."""

    log_probs_T: Array
    entropy_T: Array | None = None


def backward_reference(rows: Rows, targets_T: Array, log_z_T: Array, entropy_T: Array, grads: Gradients) -> Array:
    """float64 [2, T, V]: the gradient, and how far off float32 may be."""
    x_TV = rows.x_TV
    columns_T = targets_T - rows.start
    onehot_TV = np.arange(rows.vocab) == columns_T[:, None]
    with np.errstate(invalid="ignore"):
        log_p_TV = x_TV - log_z_T.astype(np.float64)[:, None]
    p_TV = np.exp(log_p_TV)
    grad_T = grads.log_probs_T.astype(np.float64)[:, None]
    wanted_TV = grad_T * (onehot_TV - p_TV)
    weight_TV = np.abs(grad_T)
    # No exponent below that of the smallest normal number matters.
    exponent_TV = np.clip(np.abs(log_p_TV), 0.0, 100.0)
    if grads.entropy_T is not None:
        grad_entropy_T = grads.entropy_T.astype(np.float64)[:, None]
        with np.errstate(invalid="ignore"):
            log_p_TV = np.where(p_TV > 0, log_p_TV, 0.0)
        wanted_TV = wanted_TV - grad_entropy_T * p_TV * (log_p_TV + entropy_T.astype(np.float64)[:, None])
        weight_TV = weight_TV + np.abs(grad_entropy_T) * (exponent_TV + np.abs(entropy_T)[:, None])
    size_TV = np.abs(grad_T) * onehot_TV + weight_TV * p_TV
    tolerance_TV = 4e-7 * (1.0 + exponent_TV) * size_TV + SUBNORMAL * weight_TV
    return np.stack([wanted_TV * rows.inverse, tolerance_TV * rows.inverse])


def backward_case(
    name: str,
    rows: Rows,
    targets_T: Array,
    grads: Gradients,
    num_sms: int = 1,
    log_z_T: Array | None = None,
    entropy_T: Array | None = None,
) -> Case:
    """log_z_T, entropy_T: those of the whole vocabulary where `rows` is a part of it."""
    stats_TS = stats_reference(rows.x_TV, targets_T - rows.start)
    with np.errstate(divide="ignore", invalid="ignore"):
        own_log_z_T = stats_TS[:, 0] + np.log(stats_TS[:, 1])
        own_entropy_T = np.log(stats_TS[:, 1]) - stats_TS[:, 3] / stats_TS[:, 1]
    log_z_T = (own_log_z_T if log_z_T is None else log_z_T).astype(np.float32)
    entropy_T = (own_entropy_T if entropy_T is None else entropy_T).astype(np.float32)
    memory = rows.memory()
    read_T = (grads.log_probs_T != 0) | (grads.entropy_T != 0 if grads.entropy_T is not None else False)

    def check(outputs: Outputs) -> None:
        wanted_TV, tolerance_TV = backward_reference(rows, targets_T, log_z_T, entropy_T, grads)
        wanted_TV[~read_T] = 0.0
        tolerance_TV[~read_T] = 0.0
        relative, absolute = ROUNDING[rows.dtype]
        tolerance_TV = tolerance_TV + relative * 1.01 * np.abs(wanted_TV) + absolute
        width, stride = rows.vocab + rows.padding, rows.stride
        for token in range(rows.tokens):
            row = outputs["logits_TV"][token * stride : token * stride + width]
            found_V = decode(row[: rows.vocab], rows.dtype)
            expect(f"{name} token {token}", "gradient", found_V, wanted_TV[token], tolerance_TV[token])
            expect(f"{name} token {token}", "padding", row[rows.vocab :], np.zeros(rows.padding), 0)
            gap = slice(token * stride + width, (token + 1) * stride)
            found, given = (data[gap].view(np.uint8) for data in (outputs["logits_TV"], memory.data))
            expect(f"{name} token {token}", "bytes between rows", found, given, 0)

    numbers = {**rows.numbers(), "columns": rows.vocab + rows.padding}
    buffers = {
        "logits_TV": memory,
        "targets_T": Buffer(targets_T.astype(np.int64)),
        "log_z_T": Buffer(log_z_T),
        "grad_log_probs_T": Buffer(grads.log_probs_T),
    }
    if grads.entropy_T is not None:
        buffers |= {"grad_entropy_T": Buffer(grads.entropy_T), "entropy_T": Buffer(entropy_T)}
    size = BYTES[rows.dtype]
    return Case(
        name=name,
        kernel="token_backward",
        numbers=numbers,
        buffers=buffers,
        check=check,
        traffic=(int(read_T.sum()) * rows.vocab * size, rows.tokens * (rows.vocab + rows.padding) * size),
        num_sms=num_sms,
    )
