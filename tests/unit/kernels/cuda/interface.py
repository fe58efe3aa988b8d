"""The structures of csrc/cuda/api.h, and a case: one launch with its inputs and the check of what it wrote.

Shape letters: T tokens, V columns of the logits, S statistics a token, N sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = Mapping[str, Array]
POINTER, INTEGER, FLOAT, DOUBLE = ctypes.c_uint64, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class TokenStats(ctypes.Structure):
    _fields_ = [
        ("logits_TV", POINTER),
        ("element_type", INTEGER),
        ("num_tokens", INTEGER),
        ("vocab", INTEGER),
        ("row_stride", INTEGER),
        ("targets_T", POINTER),
        ("vocab_start", INTEGER),
        ("inverse_temperature", FLOAT),
        ("entropy", INTEGER),
        ("stats_TS", POINTER),
    ]


class TokenBackward(ctypes.Structure):
    _fields_ = [
        ("logits_TV", POINTER),
        ("element_type", INTEGER),
        ("num_tokens", INTEGER),
        ("vocab", INTEGER),
        ("columns", INTEGER),
        ("row_stride", INTEGER),
        ("targets_T", POINTER),
        ("vocab_start", INTEGER),
        ("inverse_temperature", FLOAT),
        ("log_z_T", POINTER),
        ("grad_log_probs_T", POINTER),
        ("grad_entropy_T", POINTER),
        ("entropy_T", POINTER),
    ]


class SequenceReduce(ctypes.Structure):
    _fields_ = [
        ("phases", INTEGER),
        ("num_sequences", INTEGER),
        ("cu_seqlens", POINTER),
        ("mask_T", POINTER),
        ("log_probs_T", POINTER),
        ("old_log_probs_T", POINTER),
        ("sums_N2", POINTER),
        ("advantages_per_token", INTEGER),
        ("advantages", POINTER),
        ("clip_low", DOUBLE),
        ("clip_high", DOUBLE),
        ("scale", DOUBLE),
        ("ratio_N", POINTER),
        ("loss_N", POINTER),
        ("clipped_tokens_N", POINTER),
        ("grad_log_probs_T", POINTER),
    ]


ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "token_stats": TokenStats,
    "token_backward": TokenBackward,
    "sequence_reduce": SequenceReduce,
}
PARTIAL, FINISH, WHOLE = 1, 2, 3


@dataclass(frozen=True)
class Buffer:
    """Memory behind a pointer. offset: bytes past a multiple of 16; counted: its traffic is counted.

    stride: where not 0, bytes from each row of `data` to the next, with nothing between; only the interpreter, whose
    addresses are numbers, can lay rows out beyond the memory of this machine.
    """

    data: Array
    offset: int = 0
    counted: bool = False
    stride: int = 0


@dataclass(frozen=True)
class Case:
    """numbers, buffers: the fields of ARGUMENTS[kernel] by name; a pointer that is in neither is null.

    check: raises Mismatch for wrong buffers after the launch. traffic: bytes that must be read from and written to the
    counted buffer. small: cheap enough for the interpreter. status: what the launcher must return.
    """

    name: str
    kernel: str
    numbers: dict[str, float]
    buffers: dict[str, Buffer]
    check: Callable[[Outputs], None]
    traffic: tuple[int, int] | None = None
    num_sms: int = 1
    small: bool = True
    status: int = 0

    def arguments(self, addresses: Mapping[str, int]) -> ctypes.Structure:
        """addresses: of the buffers, by name."""
        return ARGUMENTS[self.kernel](**self.numbers, **addresses)


class Mismatch(Exception):
    """A kernel's numbers are not the reference's."""


def expect(case: str, what: str, found: Array, wanted: Array, tolerance: Array | float) -> None:
    """Raises Mismatch unless found is within tolerance of wanted; infinities and NaN must agree."""
    found = np.asarray(found, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        close = (np.abs(found - wanted) <= tolerance) | (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    if close.all():
        return
    worst = np.unravel_index(int(np.argmin(close)), close.shape)
    raise Mismatch(
        f"{case}: {what}{[int(i) for i in worst]} is {found[worst]!r}, not {wanted[worst]!r} "
        f"({int((~close).sum())} of {close.size} wrong)"
    )
