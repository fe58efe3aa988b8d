"""Seeded bugs: the proof of the proof.

Each patch of seeded_bugs/ breaks the sources in a way that CUDA code is broken in practice, and names the stage that is
to catch it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gspo_moe.kernels.build import SOURCES, BuildError
from tests.unit.kernels.cuda import emulation, ptx
from tests.unit.kernels.cuda.cases import far_rows, grid
from tests.unit.kernels.cuda.interface import Case, Mismatch
from tests.unit.kernels.cuda.ptx_parse import PtxError

PATCHES = sorted((Path(__file__).parent / "seeded_bugs").glob("*.patch"))
CAUGHT = (emulation.EmulationError, Mismatch, PtxError)
ORDERS = (0, -1, 7)


def emulate(kind: str, orders: tuple[int, ...]) -> Callable[[Path, Path, list[Case]], None]:
    def stage(sources: Path, build_dir: Path, cases: list[Case]) -> None:
        driver = emulation.build(kind, sources, build_dir)
        for order in orders:
            emulation.run(driver, cases, order)

    return stage


def interpret(sources: Path, build_dir: Path, cases: list[Case]) -> None:
    (kernel,) = {case.kernel for case in cases}
    far = [case for case in far_rows() if case.kernel == kernel]
    ptx.run(ptx.build(sources, build_dir, (kernel,)), [*far, *cases])


STAGES = {
    "emulation": emulate("plain", ORDERS),
    "asan_ubsan": emulate("asan", (0,)),
    "tsan": emulate("tsan", (0,)),
    "ptx": interpret,
}


def named(patch: Path, what: str) -> str:
    """What stands in a patch's head: `Caught by`, the stage, or `Kernel`, the one whose cases run."""
    found = re.search(rf"^{what}: (\w+)$", patch.read_text(), re.MULTILINE)
    assert found is not None, f"{patch.name} does not say {what}"
    return found[1]


def catch(patch: Path, stage: str, build_dir: Path) -> str | None:
    """What the stage says against the patched sources, None if it finds nothing wrong. Raises BuildError."""
    kernel = named(patch, "Kernel")
    cases = [case for case in grid() if case.small and case.kernel == kernel]
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch, "cuda")
        shutil.copytree(SOURCES, sources)
        applied = subprocess.run(
            ["patch", "--strip=1", "--no-backup-if-mismatch", "--fuzz=0", "--directory", str(sources)],
            stdin=patch.open(),
            capture_output=True,
            text=True,
            check=False,
        )
        if applied.returncode != 0:
            raise BuildError(f"{patch.name} does not fit the sources any more: {applied.stdout}")
        try:
            STAGES[stage](sources, build_dir, cases)
        except CAUGHT as error:
            return str(error)
    return None


def check_each(build_dir: Path) -> str:
    """Raises Mismatch unless every bug is caught by the stage that its patch names."""
    stages = [named(patch, "Caught by") for patch in PATCHES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(lambda patch, stage: catch(patch, stage, build_dir), PATCHES, stages))
    results = zip(PATCHES, stages, said, strict=True)
    missed = [f"{patch.stem} by {stage}" for patch, stage, words in results if words is None]
    if missed:
        raise Mismatch(f"not caught: {', '.join(missed)}")
    counts = {stage: stages.count(stage) for stage in STAGES if stage in stages}
    return f"{len(PATCHES)} caught: " + ", ".join(f"{count} by {stage}" for stage, count in counts.items())


def matrix(build_dir: Path) -> str:
    """Every bug against every stage, as a Markdown table."""
    lines = ["| bug | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for patch in PATCHES:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda stage, patch=patch: catch(patch, stage, build_dir), STAGES))
        cells = [patch.stem.replace("_", " "), *("-" if words is None else "caught" for words in found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
