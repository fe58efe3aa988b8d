"""What PTX instructions without memory, branches or other lanes compute; arrays over lanes in, one out.

Float32 subnormals are flushed by the processor's own mode, which `interpreter.run` sets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.unit.kernels.cuda.interface import Array
from tests.unit.kernels.cuda.ptx_parse import PtxError

TYPES = {
    **{f"u{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits // 8}" for bits in (16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (16, 32, 64)},
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
    "pred": "bool",
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    # The unordered ones are true where an operand is NaN.
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    # Of unsigned integers.
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}
SIMPLE: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: (~a + a.dtype.type(1)) if a.dtype.kind in "ui" else -a,
    "abs": np.abs,
    "min": lambda a, b: np.fmin(a, b),
    "max": lambda a, b: np.fmax(a, b),
    "ex2": np.exp2,
    "mov": lambda a: a,
}


def operand_type(opcode: tuple[str, ...]) -> str:
    """NumPy's name for the last type that the opcode names."""
    named = [part for part in opcode[1:] if part in TYPES]
    if not named:
        raise PtxError(f"{'.'.join(opcode)} names no type")
    return TYPES[named[-1]]


def compute(opcode: tuple[str, ...], values: list[Array], dtype: str) -> Array:
    """values: of `dtype`, but for what `special_types` says."""
    operation = opcode[0]
    if operation in SIMPLE:
        return np.asarray(SIMPLE[operation](*values))
    if operation == "setp":
        return COMPARISONS[opcode[1]](*values)
    if operation == "selp":
        return np.where(values[2], values[0], values[1])
    if operation == "mul":
        return _multiply(opcode, values[0], values[1])
    if operation in ("mad", "fma"):
        return _multiply_add(opcode, *values)
    if operation == "div":
        return values[0] / values[1] if dtype.startswith("f") else values[0] // values[1]
    if operation in ("shl", "shr"):
        return _shift(operation, values[0], values[1])
    raise PtxError(f"unknown instruction {'.'.join(opcode)}")


def _multiply(opcode: tuple[str, ...], a: Array, b: Array) -> Array:
    if "wide" in opcode:
        wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
        return a.astype(wide) * b.astype(wide)
    if "hi" in opcode:
        raise PtxError("mul.hi is not known")
    return a * b


def _multiply_add(opcode: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    """fma rounds once: in the next wider format the product of two float32 is exact, that of two float64 nearly."""
    if a.dtype.kind == "f":
        wide = np.float64 if a.dtype.itemsize == 4 else np.longdouble
        return (a.astype(wide) * b + c).astype(a.dtype)
    product = _multiply(opcode, a, b)
    return product + c.astype(product.dtype)


def _shift(operation: str, a: Array, amount: Array) -> Array:
    """Shifts by the width or more give 0, or the sign."""
    width = a.dtype.itemsize * 8
    inside = np.minimum(amount, width - 1).astype(a.dtype)
    shifted = a << inside if operation == "shl" else a >> inside
    if operation == "shr" and a.dtype.kind == "i":
        return shifted
    return np.where(amount >= width, a.dtype.type(0), shifted)


def convert(opcode: tuple[str, ...], values: list[Array]) -> Array:
    """cvt; bfloat16 as its bits, a pair with the first operand in the upper half."""
    if "bf16x2" in opcode:
        high, low = (_bfloat16(value) for value in values)
        return (high.astype(np.uint32) << 16) | low
    if "bf16" in opcode:
        return _bfloat16(values[0])
    to, source = (part for part in opcode if part in TYPES)
    value = values[0].view(TYPES[source])
    if TYPES[to].startswith("f") and value.dtype.kind == "f":
        return value.astype(TYPES[to])
    if TYPES[to].startswith("f") or value.dtype.kind == "f":
        raise PtxError(f"{'.'.join(opcode)} is not known")
    return value.astype(TYPES[to])


def _bfloat16(value: Array) -> Array:
    bits = value.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)
