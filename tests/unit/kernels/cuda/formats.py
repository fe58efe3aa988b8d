"""Element types of logits as NumPy holds them: bfloat16, which NumPy lacks, as its 16 bits."""

from __future__ import annotations

import numpy as np

from tests.unit.kernels.cuda.interface import Array

# In the order of GspoElementType.
NAMES = ("fp32", "bf16", "fp16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Half the distance between neighbours, relative; and the smallest distance, absolute.
ROUNDING = {"fp32": (2.0**-24, 1e-37), "bf16": (2.0**-8, 1e-37), "fp16": (2.0**-11, 6e-8)}


def encode(values: Array, name: str) -> Array:
    """Rounds to nearest, ties to even."""
    if name == "fp32":
        return values.astype(np.float32)
    if name == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(stored: Array, name: str) -> Array:
    """float64."""
    if name == "bf16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)
