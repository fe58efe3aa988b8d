"""Starts the program as a user does: in processes of its own, from a folder of the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MARK = "GSPO_MOE_TEST_PROGRAM"
SECONDS_TO_END = 20.0  # of helpers of multiprocessing, which notice their parent's end a moment later
TIMING = ("timing/", "memory/", "throughput/tokens_per_second", "rollout/tokens_per_second")
# Two small layers and words of two or three letters: half of all answers are right after a few seconds of cold start.
SMALL_MODEL = (
    "model.overrides.num_hidden_layers=2",
    "model.overrides.hidden_size=32",
    "model.overrides.num_experts=8",
)
TASK = ("task.options.min_length=2", "task.options.max_length=3", "rollout.max_response_tokens=6")
SMALL_RL = (
    *TASK,
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "algorithm.mini_batches=2",
    "schedule.micro_batch_tokens=64",
    "schedule.steps=8",
    "optimizer.lr=2e-3",
    "optimizer.decay=cosine",
    "evaluation.prompts=32",
    "evaluation.interval=2",
    "checkpoint.interval=3",
    "routing.engine_routes=true",
    "routing.probe_interval=2",
    "routing.probe_sequences=8",
    "routing.attribution=true",
    "routing.attribution_sequences=12",
    "routing.attribution_by_depth=true",
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended: exit code, what it wrote, and the processes it left behind, as command lines."""

    code: int
    stdout: str
    stderr: str
    left_behind: tuple[str, ...]


class Program:
    """A command under way, with every process that it starts in turn. Written output goes to files in `folder`."""

    def __init__(self, command: Sequence[str | Path], folder: Path, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._output = [folder / f"{self._mark}.{stream}" for stream in ("stdout", "stderr")]
        inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        with self._output[0].open("w") as stdout, self._output[1].open("w") as stderr:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder,
                stdout=stdout,
                stderr=stderr,
                env={**inherited, "OMP_NUM_THREADS": "1", **environment, MARK: self._mark},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def stderr(self) -> str:
        """On its standard error, so far."""
        return self._read(1)

    def kill(self) -> None:
        """SIGKILL to the program and all that it started, wherever they are by now."""
        while processes := self.processes():
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=SECONDS_TO_END)
        self._process.wait()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        """Raises TimeoutError when the condition does not come true, RuntimeError when the program ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"ended too early with {self._process.returncode}:\n{self._read(1)}")
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"not so after {seconds} s:\n{self._read(1)}")
            time.sleep(0.02)

    def finish(self, seconds: float = 300.0) -> Outcome:
        """Waits for the end; raises TimeoutError, and kills, after `seconds`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self._read(0)}{self._read(1)}") from None
        _, left = psutil.wait_procs(self.processes(), timeout=SECONDS_TO_END)
        commands = tuple(" ".join(process.cmdline()) for process in left)
        self.kill()
        return Outcome(code, self._read(0), self._read(1), commands)

    def processes(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["environ", "status"])
            if (process.info["environ"] or {}).get(MARK) == self._mark and process.info["status"] != "zombie"
        ]

    def _read(self, stream: int) -> str:
        return self._output[stream].read_text()


def gspo_moe(*arguments: str | Path) -> list[str | Path]:
    """The command line of a plain start."""
    return [BIN / "gspo-moe", *arguments]


def torchrun(processes: int, *arguments: str | Path) -> list[str | Path]:
    """The command line of a start on several processes."""
    return [BIN / "torchrun", "--standalone", "--nproc-per-node", str(processes), *arguments]


def succeed(command: Sequence[str | Path], folder: Path, **environment: str) -> Outcome:
    """Runs to the end and checks that all went well and nothing was left behind."""
    outcome = Program(command, folder, **environment).finish()
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert outcome.left_behind == ()
    return outcome


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, each strict JSON."""
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def metrics_by_step(run: Path) -> dict[int, dict[str, float]]:
    """Everything a run logged but the times of day and durations."""
    steps: dict[int, dict[str, float]] = {}
    for record in json_lines(run / "metrics.jsonl"):
        kept = {name: value for name, value in record.items() if name != "time" and not name.startswith(TIMING)}
        steps.setdefault(record["step"], {}).update(kept)
    return steps
