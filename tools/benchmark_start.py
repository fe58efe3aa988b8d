"""What a run takes until its first step is done, by phase, and then to save and to load a checkpoint, as JSON.

    python tools/benchmark_start.py [--config CONFIG.yaml] [section.key=value ...] [--processes 1] [--runs 3]

The phases are those of `gspo-moe train`, in fresh processes that run it from their start. Of each phase the least wall
and the least CPU seconds of the runs, which other work on the machine disturbs least; CPU seconds are those of the main
process and all that it started. Default: one GSPO step of `model: tiny` on the quickstart's task.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

Figures = dict[str, dict[str, float]]
DEFAULT = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
TINY = ("model.hf=null", "model.preset=tiny", "evaluation.prompts=0", "logging.progress=false")
STARTED, SAVES = "BENCHMARK_STARTED", 3


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the start of a run and its checkpoints.")
    parser.add_argument("--config", help="default: the quickstart's, with random weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--processes", type=int, default=1, help="split the experts, unless an override says otherwise")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if STARTED in os.environ:
        print(json.dumps(measure(options.config, options.overrides)))
        return 0
    config = options.config or str(DEFAULT)
    tiny = () if options.config else TINY
    overrides = [f"parallel.expert={options.processes}", *tiny, *options.overrides]
    runs = [start(config, overrides, options.processes) for _ in range(options.runs)]
    best = {phase: {key: min(run[phase][key] for run in runs) for key in runs[0][phase]} for phase in runs[0]}
    print(json.dumps({"processes": options.processes, "runs": options.runs, "phases": best}, indent=1))
    return 0


def start(config: str, overrides: Sequence[str], processes: int) -> Figures:
    """Figures of one run's main process."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, __file__, "--config", config, *overrides, f"logging.run_dir={folder}"]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        started = [
            subprocess.Popen(
                command,
                env={**os.environ, STARTED: str(time.time()), "RANK": str(rank), "LOCAL_RANK": str(rank), **place},
                stdout=subprocess.PIPE,
                stderr=None if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(processes)
        ]
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit("a process failed; see above")
    found: Figures = json.loads(said[0].splitlines()[-1])
    return found


class Clock:
    """Wall and CPU seconds between marks, the first of them since the process was started."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self._wall, self._cpu = float(os.environ[STARTED]), 0.0

    def mark(self, phase: str) -> None:
        wall, cpu = time.time(), cpu_seconds()
        self.figures[phase] = {"wall": round(wall - self._wall, 3), "cpu": round(cpu - self._cpu, 3)}
        self._wall, self._cpu = time.time(), cpu_seconds()


def cpu_seconds() -> float:
    """Of this process and all that it started, ended or not."""
    own = psutil.Process()
    times = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def measure(config_path: str, overrides: Sequence[str]) -> Figures:
    """One step of `gspo-moe train`, then saves and loads."""
    clock = Clock()
    from gspo_moe import cli, garbage

    config = cli.load_config(config_path, overrides)
    clock.mark("python, config")
    with garbage.imports():
        import torch

        clock.mark("import torch")
        from gspo_moe.parallel.groups import shut_down
        from gspo_moe.training import checkpoint, loop, resuming, session
        from gspo_moe.training.preflight import preflight, take_run_folder

    clock.mark("other imports")
    take_run_folder(config, ends_together=False)
    plan = preflight(config)
    clock.mark("task, tokenizer, checks")
    opened = session.open_session(plan)
    clock.mark("process groups, model")
    trainer = resuming.open_trainer(opened)
    log = loop.RunLog(trainer)
    clock.mark("optimizer, log files")
    loop._step(trainer, log)
    clock.mark("first step")
    total = {key: round(sum(phase[key] for phase in clock.figures.values()), 3) for key in ("wall", "cpu")}
    for number in range(SAVES):
        torch.distributed.barrier()
        trainer.progress = replace(trainer.progress, step=number + 1)
        clock.mark("")
        saved = checkpoint.save_checkpoint(
            trainer.checkpoints, opened.model, trainer.optimizer, trainer.progress, 1, plan.tokenizer
        )
        clock.mark("first save" if number == 0 else "save")
        checkpoint.load_checkpoint(saved, opened.model, trainer.optimizer)
        clock.mark("first load" if number == 0 else "load")
    opened.close()
    log.close()
    shut_down()
    del clock.figures[""]
    return {"start to the end of the first step": total, **clock.figures}


if __name__ == "__main__":
    raise SystemExit(main())
