"""What fault injection asks of a run: who belongs to it, that nothing of it is left, that its files are whole."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e.conftest import FinishedRun
from tests.e2e.program import ROOT, SMALL_RL, TIMING, Program, json_lines, metrics_by_step

LAUNCHER: tuple[str | Path, ...] = ("bash", ROOT / "launch" / "torchrun.sh", "--nproc-per-node", "2")
# What of a run's folder may change after its processes have gone: nothing.
GONE_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """The quickstart's GSPO stage in another folder, on two ranks, from the quickstart's cold start."""

    run: Path
    quickstart: FinishedRun

    def command(self, *overrides: str, options: Sequence[str] = (), script: Sequence[str] = ()) -> list[str | Path]:
        return [*LAUNCHER, *options, "--", *script, *self.arguments(*overrides)]

    def arguments(self, *overrides: str) -> list[str | Path]:
        """What stands behind the launcher's `--`."""
        model = f"model.hf={self.quickstart.path / 'cold_start' / 'hf'}"
        config = ROOT / "examples" / "quickstart.yaml"
        given = [*SMALL_RL, "checkpoint.interval=1", "logging.progress=false", *overrides]
        return ["train", config, model, f"logging.run_dir={self.run}", *given]

    def has_step(self, step: int) -> bool:
        metrics = self.run / "metrics.jsonl"
        return metrics.exists() and f'"step": {step},' in metrics.read_text()

    def check(self) -> None:
        """It ended as the quickstart did, which nothing interrupted, bit for bit; no line is missing or doubled."""
        reference = self.quickstart.path
        assert metrics_by_step(self.run) == metrics_by_step(reference)
        weights = Path("hf") / "model.safetensors"
        assert (self.run / weights).read_bytes() == (reference / weights).read_bytes()
        assert json_lines(self.run / "samples.jsonl") == json_lines(reference / "samples.jsonl")
        lines = Counter(_line(record) for record in json_lines(self.run / "metrics.jsonl"))
        assert set(lines.values()) == {1}
        expected = Counter(_line(record) for record in json_lines(reference / "metrics.jsonl"))
        # The quickstart saves less often, which is a line with nothing but times.
        assert {line for line in lines if line[1]} == {line for line in expected if line[1]}


def _line(record: dict[str, float]) -> tuple[float, tuple[str, ...]]:
    """A line of metrics.jsonl by its step and the names of what it measured, without times."""
    measured = (name for name in record if name not in ("step", "time") and not name.startswith(TIMING))
    return record["step"], tuple(sorted(measured))


def ranks(program: Program) -> list[psutil.Process]:
    """Of a program that is a launcher, in order."""
    found = [one for one in psutil.Process(program.pid).children() if "RANK" in one.environ()]
    return sorted(found, key=lambda one: int(one.environ()["RANK"]))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def nothing_goes_on(program: Program, run: Path) -> None:
    """Nothing of the program is alive soon after a death, and then nothing is written any more."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := program.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        raise AssertionError(f"alive after {GONE_SECONDS} s: {left}\n{program.stderr}")
    before = _files(run)
    time.sleep(0.5)
    assert _files(run) == before


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
