"""Compiles csrc/cuda with nvcc, GPU or not, and says which sources a library is made of. Standard library only, for
setup.py, the loader and the kernels' proof.

GSPO_MOE_CUDA=auto (default) compiles where a toolkit is found, 1 insists on it, 0 leaves the CUDA kernels out.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
SOURCES = CSRC / "cuda"
# Ampere, Hopper, Blackwell; PTX of the oldest for what comes later.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
PTX_OF = "compute_80"
# exp2f is one instruction with -ftz=true only; the sums that matter are far from subnormal numbers.
FLAGS = ("-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# Of ops.cpp and csrc/cpu. The stable ABI is that of the first torch that has all of it that ops.cpp uses.
CPU_FLAGS = ("-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000")
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror")
OLDEST_TOOLKIT = (12, 8)


@dataclass(frozen=True)
class Family:
    """Kernels of one job. sources: in csrc/cuda; max_registers: that a thread of any of them may have."""

    name: str
    sources: tuple[str, ...]
    max_registers: int


# 1024 threads, which these blocks may have, of 64 registers are all that a multiprocessor has.
FAMILIES = (
    Family("token_log_probs", ("token_stats.cu", "token_backward.cu"), 64),
    Family("sequence_reduce", ("sequence_reduce.cu",), 64),
)
CHECKS = "checks.cu"  # of every family's arguments, on the host
LAUNCHERS = (*(source for family in FAMILIES for source in family.sources), CHECKS)


class BuildError(Exception):
    """A build that was asked for and cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit. nvcc: its compiler, or a wrapper of it; top: its folder; version: of nvcc."""

    nvcc: Path
    top: Path
    version: tuple[int, int]

    @property
    def libraries(self) -> Path:
        return self.top / ("lib64" if (self.top / "lib64").is_dir() else "lib")


@dataclass(frozen=True)
class KernelUse:
    """What ptxas says of one kernel on one architecture; bytes except `registers`."""

    family: Family
    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, else of the nvcc on PATH, else of /usr/local/cuda; None where there is none of use."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    in_home, in_default = (shutil.which("nvcc", path=f"{home}/bin") if home else None for home in homes)
    nvcc = in_home or shutil.which("nvcc") or in_default
    if nvcc is None:
        return None
    # The nvcc of PATH may be a wrapper in another folder; only nvcc itself knows where its toolkit is.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    version = re.search(r"release (\d+)\.(\d+)", release.stdout)
    if top is None or version is None:
        return None
    return Toolkit(Path(nvcc), Path(top[1].strip()).resolve(), (int(version[1]), int(version[2])))


def cuda_toolkit() -> Toolkit | None:
    """The toolkit to build with as GSPO_MOE_CUDA says, None to leave the CUDA kernels out. Raises BuildError."""
    mode = os.environ.get("GSPO_MOE_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"GSPO_MOE_CUDA={mode!r} is not known; set auto, 0 or 1")
    if mode == "0":
        return None
    toolkit = find_toolkit()
    if toolkit is not None and toolkit.version >= OLDEST_TOOLKIT:
        return toolkit
    if mode == "auto":
        return None
    found = "no nvcc was found" if toolkit is None else "nvcc is {}.{}".format(*toolkit.version)
    oldest = "{}.{}".format(*OLDEST_TOOLKIT)
    raise BuildError(
        f"GSPO_MOE_CUDA=1 asks for the CUDA kernels, but {found}; install CUDA {oldest} or newer "
        "and point CUDA_HOME at it, or set GSPO_MOE_CUDA=0"
    )


def cuda_objects(build_dir: str | Path) -> list[str]:
    """Compiles the CUDA kernels for every architecture and prints what they use; [] where they are left out.

    Returns the object files to link. Raises BuildError for a compile error, a warning, a spill, local memory, or more
    than its family's registers.
    """
    toolkit = cuda_toolkit()
    if toolkit is None:
        return []
    objects, uses = compile_objects(toolkit, Path(build_dir))
    for line in summarize(uses):
        print(line)
    return objects


def cuda_link_arguments() -> list[str]:
    """What the linker needs beside `cuda_objects`: the static runtime, which loads without a GPU or a driver."""
    toolkit = cuda_toolkit()
    if toolkit is None:
        return []
    return [str(toolkit.libraries / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]


def compile_objects(toolkit: Toolkit, build_dir: Path, sources: Path = SOURCES) -> tuple[list[str], list[KernelUse]]:
    """Objects and resource use of every launcher in `sources`; objects of equal sources and flags are kept."""
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    flags = [*FLAGS, *STRICT, *targets, f"-gencode=arch={PTX_OF},code={PTX_OF}"]
    build_dir.mkdir(parents=True, exist_ok=True)
    key = fingerprint(sources, [*flags, str(toolkit.version)])

    def compile_one(name: str) -> tuple[str, str]:
        target = build_dir / f"{Path(name).stem}-{key}.o"
        log = target.with_suffix(".log")
        if not (target.exists() and log.exists()):
            part = target.with_suffix(f".{os.getpid()}.o")
            log.write_text(run([str(toolkit.nvcc), *flags, "-c", str(sources / name), "-o", str(part)]))
            part.replace(target)
        return str(target), log.read_text()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, LAUNCHERS))
    log_of = {name: log for name, (_, log) in zip(LAUNCHERS, done, strict=True)}
    uses = [use for family in FAMILIES for name in family.sources for use in resource_use(family, log_of[name])]
    check_resources(uses)
    return [target for target, _ in done], uses


def library_fingerprint(csrc: Path = CSRC) -> str | None:
    """Of all that the library is made of, which is built into it; None where there are no sources, as in a wheel."""
    if not csrc.is_dir():
        return None
    return fingerprint(csrc, [*CPU_FLAGS, *FLAGS, *ARCHITECTURES, PTX_OF])


def fingerprint(sources: Path, flags: list[str]) -> str:
    """A hash of all sources and flags: any header may reach any object."""
    files = sorted(path for path in sources.rglob("*") if path.is_file())
    parts = [
        *(str(path.relative_to(sources)).encode() + path.read_bytes() for path in files),
        *(flag.encode() for flag in flags),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def run(command: list[str]) -> str:
    """Runs a compiler and returns what it said. Raises BuildError with that where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{said}")
    return said


def resource_use(family: Family, log: str) -> Iterator[KernelUse]:
    """Parses what `ptxas -v` prints of a source of the family."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    for found in entry.finditer(log):
        spills = int(found["stores"]) + int(found["loads"])
        numbers = int(found["registers"]), int(found["stack"]), spills
        yield KernelUse(family, found["kernel"], found["architecture"], *numbers)


def check_resources(uses: list[KernelUse]) -> None:
    """Raises BuildError unless every family has kernels for every architecture, and none spills or uses too much."""
    wanted = {(family.name, architecture) for family in FAMILIES for architecture in ARCHITECTURES}
    missing = wanted - {(use.family.name, use.architecture) for use in uses}
    if missing:
        raise BuildError(f"ptxas reported no kernel of {', '.join(sorted(map(' for '.join, missing)))}")
    for use in uses:
        if use.spills or use.stack or use.registers > use.family.max_registers:
            raise BuildError(
                f"{use.kernel} on {use.architecture}: {use.registers} registers of {use.family.max_registers}, "
                f"{use.stack} bytes of stack, {use.spills} bytes spilled; the kernel must be made smaller"
            )


def summarize(uses: list[KernelUse]) -> list[str]:
    """One line an architecture: each family's kernels, registers from least to most, and spills."""
    lines = []
    for architecture in ARCHITECTURES:
        parts = []
        for family in FAMILIES:
            registers = [use.registers for use in uses if (use.family, use.architecture) == (family, architecture)]
            parts.append(f"{len(registers)} {family.name} of {min(registers)} to {max(registers)} registers")
        lines.append(f"{architecture}: {', '.join(parts)}, 0 bytes spilled")
    return lines
