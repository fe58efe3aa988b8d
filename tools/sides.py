"""One side of a race: a program in processes of its own, its figures, and the memory that they all take together."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gspo_moe.errors import TrainingError

ROOT = Path(__file__).parents[1]
LOOK_SECONDS = 0.05
FEWEST_LOOKS = 1.0  # a second
END_SECONDS = 20.0
SEARCH_SECONDS = 1.0  # between searches for new processes, which cost more than a look at known ones
LAST_LINES = 40
PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / 2**30
# As launch/torchrun.sh sets them where there is no GPU.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


@dataclass(frozen=True)
class Side:
    """figures: the option by which the command takes the file for its figures; None for one that leaves none."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    figures: str | None = "--json"


@dataclass(frozen=True)
class Outcome:
    """figures: what the program wrote. Peaks in GiB: of all its processes together, pages of files (libraries) counted
    once, and of the largest one.
    """

    figures: dict[str, Any]
    together_gib: float
    largest_gib: float


class Memory:
    """Peaks of a process and its descendants, from /proc; they must be looked at while they live."""

    def __init__(self, pid: int) -> None:
        self.together_gib = self.largest_gib = 0.0
        self._seen = 0
        self._begun = time.monotonic()
        self._root = pid
        self._known = [pid]
        self._searched = 0.0

    def look(self) -> None:
        if time.monotonic() - self._searched > SEARCH_SECONDS:
            self._known, self._searched = self._search(), time.monotonic()
        pages = [found for pid in self._known if (found := _pages(pid)) is not None]
        if pages:
            self._seen += 1
            own, of_files = sum(resident - files for resident, files in pages), max(files for _, files in pages)
            self.together_gib = max(self.together_gib, (own + of_files) * PAGE_GIB)
            self.largest_gib = max(self.largest_gib, max(resident for resident, _ in pages) * PAGE_GIB)

    def fault(self) -> str | None:
        """None where it was looked at often enough for peaks."""
        seconds = time.monotonic() - self._begun
        if self._seen >= seconds * FEWEST_LOOKS:
            return None
        return (
            f"its memory could be looked at only {self._seen} times in {seconds:.0f} s; free the machine and try again"
        )

    def _search(self) -> list[int]:
        try:
            return [self._root, *(child.pid for child in psutil.Process(self._root).children(recursive=True))]
        except psutil.NoSuchProcess:
            return self._known


def _pages(pid: int) -> tuple[int, int] | None:
    """Resident pages of a process, and those of files and shared memory among them; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]), int(fields[2])


def run_side(side: Side) -> Outcome:
    """Runs it to its end. Raises TrainingError, with the end of what it said, where it fails or writes no figures."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **side.environment}
    with tempfile.TemporaryDirectory() as folder:
        file, said = Path(folder) / "found.json", Path(folder) / "output.txt"
        with said.open("w") as output:
            command = [*side.command, *([] if side.figures is None else [side.figures, str(file)])]
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT
            )
            memory = Memory(process.pid)
            try:
                while process.poll() is None:
                    memory.look()
                    time.sleep(LOOK_SECONDS)
            finally:
                _end(process)
        if side.figures is None and not process.returncode:
            file.write_text("{}")
        if process.returncode or not file.is_file():
            last = "\n".join(said.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise TrainingError(
                f"{side.name} ended with exit code {process.returncode}; its last lines:\n{last}\n"
                f"mend that, or run it alone: {' '.join(side.command)}"
            )
        if memory.fault() is not None:
            raise TrainingError(f"{side.name}: {memory.fault()}")
        return Outcome(json.loads(file.read_text()), memory.together_gib, memory.largest_gib)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a side that runs yet, with all its processes, which may be in sessions of their own."""
    if process.poll() is not None:
        return
    left = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(left, timeout=1)[1]:
        child.kill()


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def python_script(name: str, python: str, arguments: Sequence[str], threads: int, script: str) -> Side:
    """A script of tools/ in one process of that Python."""
    environment = {"OMP_NUM_THREADS": str(threads), **ALLOCATOR}
    return Side(name, (python, str(ROOT / "tools" / script), *arguments), environment)


def torchrun_script(name: str, python: str, arguments: Sequence[str], processes: int, script: str) -> Side:
    """A script of tools/ in that many processes, one thread each, as launch/torchrun.sh starts them."""
    start = ("bash", str(ROOT / "launch" / "torchrun.sh"), "--nproc-per-node", str(processes), "--")
    environment = {"OMP_NUM_THREADS": "1", "GSPO_MOE_PYTHON": python}
    return Side(name, (*start, str(ROOT / "tools" / script), *arguments), environment)
