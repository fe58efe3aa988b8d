"""Runs RL steps for a long time and tells whether memory, handles, threads, child processes or a step's time grow.

    python tools/soak.py [--minutes 60] [--steps N] [--look SECONDS] [--json FILE] [section.key=value ...]

`gspo-moe train` on the tiny model of examples/own_data, with two reward workers of which now and then one dies, raises
or prints, and every ten steps an evaluation and a checkpoint, two of which are kept. Watched from outside: nothing in
the program is changed. A step's time is CPU seconds, which other work on the machine changes little. Ends the run as a
user does, by SIGTERM. Exit code 1 where a figure surely grows (tools/flatness.py says by how much each may), or where
the run fails or leaves a process behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from tools.flatness import table, trends

ROOT = Path(__file__).parents[1]
END_SECONDS = 60.0
MIB = 2**20
REWARD = """
import os, random

def reward(response, answer):
    chance = random.random()
    if chance < 0.0005:
        os._exit(1)
    if chance < 0.001:
        raise ValueError("as planned")
    if chance < 0.01:
        print(f"rewarded {response!r}")
    return 1.0 - abs(len(response) - len(answer)) / 10 if response.strip().isdecimal() else 0.0
"""
OVERRIDES = (
    "task.reward.workers=2",
    "schedule.steps=100000000",
    "evaluation.interval=10",
    "evaluation.samples=1",
    "checkpoint.interval=10",
    "checkpoint.keep=2",
    "logging.progress=false",
)


@dataclass
class Watched:
    """What was seen of the run, a row for each look that found it further."""

    steps: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def look(self, process: psutil.Process, metrics: Path) -> None:
        step = last_step(metrics)
        if step is None or (self.steps and step <= self.steps[-1]):
            return
        children = process.children(recursive=True)
        times = process.cpu_times()
        row = {
            "memory_mib": process.memory_info().rss / MIB,
            "children_memory_mib": sum(map(resident, children)) / MIB,
            "handles": process.num_fds(),
            "threads": process.num_threads(),
            "children": len(children),
            "cpu_seconds": times.user + times.system,
        }
        self.steps.append(step)
        for name, value in row.items():
            self.figures.setdefault(name, []).append(value)

    def by_step(self) -> tuple[list[float], dict[str, list[float]]]:
        """The same with CPU seconds a step, since the look before, in place of their sum."""
        figures = {name: values[1:] for name, values in self.figures.items()}
        cpu = self.figures["cpu_seconds"]
        del figures["cpu_seconds"]
        figures["step_cpu_seconds"] = [
            (cpu[number] - cpu[number - 1]) / (self.steps[number] - self.steps[number - 1])
            for number in range(1, len(self.steps))
        ]
        return self.steps[1:], figures


def resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def last_step(metrics: Path) -> int | None:
    """Of the last whole line of a run's metrics."""
    if not metrics.is_file():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="end after so many, if that is earlier")
    parser.add_argument("--look", type=float, default=0.5, metavar="SECONDS", help="between looks at it (0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="takes every look")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fault, watched = run(Path(folder), options)
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": watched.steps, **watched.figures}) + "\n")
    try:
        found = trends(*watched.by_step())
    except (ValueError, IndexError, KeyError) as error:
        fault, found = fault or f"too few steps to tell ({error})", {}
    print(f"{watched.steps[-1] if watched.steps else 0:.0f} steps, {len(watched.steps)} looks\n{table(found)}")
    if fault is not None:
        print(f"soak: {fault}", file=sys.stderr)
    return int(fault is not None or any(one.grows for one in found.values()))


def run(folder: Path, options: argparse.Namespace) -> tuple[str | None, Watched]:
    """What went wrong, and what was seen until the time was up or the steps were done."""
    (folder / "soak_reward.py").write_text(REWARD)
    command = [sys.executable, "-m", "gspo_moe", "train", str(ROOT / "examples" / "own_data" / "config.yaml")]
    own = [f"logging.run_dir={folder / 'run'}", f"task.reward.name={folder / 'soak_reward.py'}:reward"]
    watched = Watched()
    with (folder / "said").open("w+") as said:
        started = subprocess.Popen(
            [*command, *OVERRIDES, *own, *options.overrides],
            cwd=ROOT,
            stdout=said,
            stderr=said,
            # Of several threads those that wait for others spin, the longer the more other work there is.
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)},
        )
        process, end = psutil.Process(started.pid), time.monotonic() + 60 * options.minutes
        while (
            started.poll() is None
            and time.monotonic() < end
            and (watched.steps or [0])[-1] < (options.steps or math.inf)
        ):
            time.sleep(options.look)
            with contextlib.suppress(psutil.Error):  # it has ended just now
                watched.look(process, folder / "run" / "metrics.jsonl")
        descendants = process.children(recursive=True) if started.poll() is None else []
        started.terminate()
        code = started.wait(END_SECONDS)
        left = psutil.wait_procs(descendants, END_SECONDS / 10)[1]
        for one in left:
            one.kill()
        said.seek(0)
        if code != 0:
            return f"the run ended with exit code {code}:\n{said.read()[-2000:]}", watched
        return (f"{len(left)} processes were left behind" if left else None), watched


if __name__ == "__main__":
    sys.exit(main())
