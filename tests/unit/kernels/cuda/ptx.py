"""Compiles the CUDA sources to PTX and runs cases on it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gspo_moe.kernels.build import FLAGS, PTX_OF, find_toolkit, fingerprint
from gspo_moe.kernels.build import run as call
from tests.unit.kernels.cuda import interpreter
from tests.unit.kernels.cuda.interface import ARGUMENTS, Case
from tests.unit.kernels.cuda.ptx_parse import Kernel, parse

STORAGE = ("Float32", "Bfloat16", "Float16")
BLOCK_SIZES = (32, 256, 64, 128)


def build(sources: Path, build_dir: Path, names: tuple[str, ...] = tuple(ARGUMENTS)) -> dict[str, Kernel]:
    """The instantiations of `names`, by mangled name; the text is kept by content. Raises BuildError."""
    toolkit = find_toolkit()
    assert toolkit is not None
    flags = [*FLAGS, f"-arch={PTX_OF}", "--ptx"]
    key = fingerprint(sources, [*flags, str(toolkit.version)])
    build_dir.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str) -> str:
        target = build_dir / f"{name}-{key}.ptx"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.ptx")
            call([str(toolkit.nvcc), *flags, str(sources / f"{name}.cu"), "-o", str(part)])
            part.replace(target)
        return target.read_text()

    kernels: dict[str, Kernel] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for text in pool.map(compile_one, names):
            kernels |= parse(text)
    return kernels


def run(kernels: dict[str, Kernel], cases: Iterable[Case]) -> int:
    """Runs and checks all cases that launch something, in grids and blocks of several sizes; returns how many."""
    launched = 0
    for case in cases:
        if items(case) > 0:
            run_case(kernels, case, launched)
            launched += 1
    return launched


def run_case(kernels: dict[str, Kernel], case: Case, variant: int) -> tuple[int, int]:
    """variant: picks the sizes of grid and block. Returns the bytes counted."""
    # Two blocks for more items: a block then takes several.
    grid = min(items(case), 2), 1 + variant % 3 % 2 if case.kernel == "token_backward" else 1
    return interpreter.run(choose(kernels, case), case, grid, BLOCK_SIZES[variant % len(BLOCK_SIZES)])


def items(case: Case) -> int:
    """What blocks share out: sequences, or tokens that have columns."""
    if case.kernel == "sequence_reduce":
        return int(case.numbers["num_sequences"])
    return int(case.numbers["num_tokens"]) if case.numbers.get("columns", 1) else 0


def choose(kernels: dict[str, Kernel], case: Case) -> Kernel:
    """The instantiation that the launcher takes for a case."""
    parts = [case.kernel]
    if case.kernel != "sequence_reduce":
        entropy = case.numbers.get("entropy", int("grad_entropy_T" in case.buffers))
        parts += [STORAGE[int(case.numbers["element_type"])], f"Lb{int(entropy)}E"]
    (found,) = [kernel for name, kernel in kernels.items() if all(part in name for part in parts)]
    return found


def inner_loops(kernels: dict[str, Kernel]) -> str:
    """Instructions a logit in the loops with four loads of 16 bytes, a line a kernel.

    Moves between registers are left out; the branch that raises the maximum is counted as taken.
    """
    lines = []
    for kernel in kernels.values():
        for end, instruction in enumerate(kernel.code):
            loop = kernel.code[instruction.target : end + 1] if 0 <= instruction.target <= end else []
            operations = [".".join(each.opcode[:2]) for each in loop if each.opcode[0] != "mov"]
            if sum("v4" in each.opcode and each.opcode[0] == "ld" for each in loop) == 4:
                logits = 4 * (4 if "Float32" in kernel.name else 8)
                exponentials = operations.count("ex2.approx")
                lines.append(f"{kernel.name}: {len(operations) / logits:.1f}, of them {exponentials / logits:.2f} ex2")
                break
    return "\n".join(lines)
