"""Builds the CUDA sources with g++ under the emulation of `emulation/`, and runs cases in it."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gspo_moe.kernels.build import LAUNCHERS, fingerprint
from tests.unit.kernels.cuda.interface import ARGUMENTS, Case, Mismatch

HERE = Path(__file__).parent / "emulation"
KERNELS = tuple(ARGUMENTS)
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
COMMON = ("-std=c++17", "-g1", *WARNINGS)
SANITIZERS: dict[str, tuple[str, ...]] = {
    "plain": ("-O2",),
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-fsanitize=thread"),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=71",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    # A small history keeps a thousand fibers within memory.
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=72:history_size=0:report_bugs=1",
}


class EmulationError(Exception):
    """The emulation or a sanitizer ended the run; the message is what it printed."""


def build(kind: str, sources: Path, build_dir: Path) -> Path:
    """The driver of `sources` under SANITIZERS[kind]; kept by content."""
    flags = [*COMMON, *SANITIZERS[kind]]
    key = fingerprint(sources, [*flags, fingerprint(HERE, [])])
    target = build_dir / f"driver-{kind}-{key}"
    if target.exists():
        return target
    build_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build_dir) as scratch:
        # The fibers annotate themselves; instrumented, a switch of stacks would look like a bug.
        units = [
            ([*COMMON, "-O2"], HERE / "fibers.cpp"),
            ([*COMMON, "-O2"], HERE / "driver.cpp"),
            *((flags, sources / name) for name in LAUNCHERS),
        ]

        def compile_one(unit: tuple[list[str], Path]) -> str:
            options, source = unit
            made = f"{scratch}/{source.stem}.o"
            call("g++", *options, f"-I{HERE}", f"-I{sources}", "-x", "c++", "-c", str(source), "-o", made)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, units))
        linked = f"{scratch}/driver"
        call("g++", *flags, *objects, "-o", linked)
        os.replace(linked, target)
    return target


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulationError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@cache
def fixed_addresses() -> list[str]:
    """A prefix of commands: TSan may not stand randomized addresses. Where a container forbids it, nothing."""
    prefix = ["setarch", "--addr-no-randomize"]
    allowed = (
        shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    )
    return prefix if allowed else []


def run(driver: Path, cases: Sequence[Case], order: int) -> list[tuple[int, int]]:
    """Launches every case and checks it; returns bytes read from and written to counted buffers, case by case.
    Raises EmulationError or Mismatch.

    order: of a block's threads, 0 ascending, -1 descending, else the seed of a permutation.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, results = Path(scratch, "cases"), Path(scratch, "results")
        with given.open("wb") as file:
            file.write(struct.pack("<q", len(cases)))
            for case in cases:
                file.write(packed(case))
        command = [*fixed_addresses(), str(driver), str(given), str(results), str(order)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **ENVIRONMENT}
        )
        if done.returncode != 0:
            raise EmulationError(f"exit {done.returncode}: {done.stderr[:3000]}")
        with results.open("rb") as file:
            return [check_result(case, file) for case in cases]


def packed(case: Case) -> bytes:
    arguments = ARGUMENTS[case.kernel]
    parts = [
        struct.pack("<qqq", KERNELS.index(case.kernel), case.num_sms, ctypes.sizeof(arguments)),
        bytes(case.arguments({})),
        struct.pack("<q", len(case.buffers)),
    ]
    for name, buffer in case.buffers.items():
        data = np.ascontiguousarray(buffer.data)
        parts.append(struct.pack("<qqqq", getattr(arguments, name).offset, buffer.offset, data.nbytes, buffer.counted))
        parts.append(data.tobytes())
    return b"".join(parts)


def check_result(case: Case, results: BinaryIO) -> tuple[int, int]:
    status, bytes_read, bytes_written = struct.unpack("<qqq", results.read(24))
    outputs = {
        name: np.frombuffer(results.read(buffer.data.nbytes), dtype=buffer.data.dtype).reshape(buffer.data.shape)
        for name, buffer in case.buffers.items()
    }
    if status != case.status:
        raise Mismatch(f"{case.name}: the launch returned {status}, not {case.status}")
    case.check(outputs)
    traffic = bytes_read, bytes_written
    if case.traffic is not None and traffic != case.traffic:
        raise Mismatch(f"{case.name}: bytes read and written are {traffic}, not {case.traffic}")
    return traffic
