"""What can be known of the CUDA kernels without a GPU, stage by stage: `python -m tests.unit.kernels.cuda.proof`.

Prints a line a stage and ends with 1 if one fails. --seed N repeats a run's random cases; --matrix runs every seeded
bug through every stage instead, --instructions counts those of the inner loops.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gspo_moe.kernels.build import SOURCES, BuildError, compile_objects, find_toolkit, summarize
from tests.unit.kernels.cuda import bugs, emulation, ptx
from tests.unit.kernels.cuda.cases import far_rows, fuzz, grid, refused, traffic_cases
from tests.unit.kernels.cuda.interface import Case, Mismatch
from tests.unit.kernels.cuda.ptx_parse import PtxError

BUILD_DIR = Path(__file__).parents[4] / "build" / "kernels"
FUZZ_CASES = 40
FAILURES = (BuildError, emulation.EmulationError, Mismatch, PtxError)


@dataclass(frozen=True)
class Proof:
    """One run. seed: of its random cases."""

    seed: int

    def cases(self) -> list[Case]:
        return [*grid(), *fuzz(self.seed, FUZZ_CASES)]

    def nvcc(self) -> str:
        toolkit = find_toolkit()
        assert toolkit is not None
        _, uses = compile_objects(toolkit, BUILD_DIR / "nvcc")
        return "; ".join(summarize(uses))

    def emulation(self) -> str:
        return self._emulate("plain", (0, -1, self.seed % 1000 + 1))

    def asan_ubsan(self) -> str:
        return self._emulate("asan", (0,))

    def tsan(self) -> str:
        return self._emulate("tsan", (0,))

    def _emulate(self, kind: str, orders: tuple[int, ...]) -> str:
        driver = emulation.build(kind, SOURCES, BUILD_DIR)
        cases = [*self.cases(), *refused()]
        for order in orders:
            emulation.run(driver, cases, order)
        return f"{len(cases)} cases in {len(orders)} thread order{'s' * (len(orders) > 1)}"

    def ptx(self) -> str:
        kernels = ptx.build(SOURCES, BUILD_DIR)
        cases = [*(case for case in self.cases() if case.small), *far_rows()]
        return f"{ptx.run(kernels, cases)} cases, no race"

    def traffic(self) -> str:
        """Every case checks its traffic exactly; these are the figures for Qwen3's vocabulary."""
        forward, backward = traffic_cases()
        driver = emulation.build("plain", SOURCES, BUILD_DIR)
        kernels = ptx.build(SOURCES, BUILD_DIR)
        said = []
        for case, traffic in zip((forward, backward), emulation.run(driver, [forward, backward], 0), strict=True):
            if ptx.run_case(kernels, case, 1) != traffic:
                raise Mismatch(f"{case.name}: the emulation counts other bytes than the PTX")
            size = case.buffers["logits_TV"].data.nbytes
            said.append(f"{case.name} {traffic[0] / size:.4f} read, {traffic[1] / size:.4f} written")
        return "of the logits: " + "; ".join(said)

    def seeded_bugs(self) -> str:
        return bugs.check_each(BUILD_DIR)


STAGES: dict[str, Callable[[Proof], str]] = {
    "nvcc": Proof.nvcc,
    "emulation": Proof.emulation,
    "asan_ubsan": Proof.asan_ubsan,
    "tsan": Proof.tsan,
    "ptx": Proof.ptx,
    "traffic": Proof.traffic,
    "seeded_bugs": Proof.seeded_bugs,
}


def missing_tools() -> list[str]:
    """What must be installed for all stages."""
    missing = [tool for tool in ("g++", "patch") if shutil.which(tool) is None]
    return missing if find_toolkit() else ["nvcc", *missing]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    options = parser.parse_args()
    if missing := missing_tools():
        print(f"the proof needs {', '.join(missing)}; install them first", file=sys.stderr)
        return 1
    if options.matrix:
        print(bugs.matrix(BUILD_DIR))
        return 0
    if options.instructions:
        print(ptx.inner_loops(ptx.build(SOURCES, BUILD_DIR)))
        return 0
    print(f"random cases: --seed {options.seed}, {os.cpu_count()} processors", flush=True)
    proof, failed = Proof(options.seed), False
    for name, stage in STAGES.items():
        start = time.monotonic()
        try:
            verdict, said = "ok", stage(proof)
        except FAILURES as error:
            verdict, said, failed = "FAILED", str(error), True
        print(f"{name:12} {verdict:6} {time.monotonic() - start:5.1f} s  {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
