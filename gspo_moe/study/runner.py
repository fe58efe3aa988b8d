"""Runs jobs as processes, as many at once as the machine has room for, each in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gspo_moe.config.checkpoints import newest_checkpoint
from gspo_moe.config.continuing import METRICS_FILE
from gspo_moe.errors import ConfigError
from gspo_moe.study.cells import Job

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
PROGRAM = ("-m", "gspo_moe")
LOG_FILE = "log.txt"
LAST_LINES = 12
# glibc gives big buffers back to the kernel at every step otherwise, which costs a CPU run dearly.
CPU_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    devices: tuple[str, ...]
    started: float = field(default_factory=time.monotonic)


@dataclass
class Outcome:
    """Jobs by what became of them. skipped: those whose needs failed."""

    finished: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)


def slots(processes: int, at_once: int | None) -> list[tuple[str, ...]]:
    """For each job that may run at once, the GPUs it gets, as CUDA_VISIBLE_DEVICES has them; none on CPU.

    Raises ConfigError where there are fewer GPUs than that needs.
    """
    gpus = visible_gpus()
    room = len(gpus) // processes if gpus else max(1, (os.cpu_count() or 1) // processes)
    count = room if at_once is None else at_once
    if gpus and not 0 < count <= room:
        raise ConfigError(
            f"processes={processes} with cells_at_once={at_once} needs {max(1, count) * processes} GPUs and "
            f"{len(gpus)} are visible; lower one of them"
        )
    return [tuple(gpus[index * processes : (index + 1) * processes]) for index in range(count)]


def visible_gpus() -> list[str]:
    """Names of the GPUs that a child process may be given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        return [str(number) for number, _ in enumerate(listed.splitlines())]
    return []


def run_jobs(
    jobs: Sequence[Job],
    processes: int,
    at_once: int | None,
    show: Callable[[Sequence[Running], Outcome], None],
    program: Sequence[str] = PROGRAM,
) -> Outcome:
    """Runs the jobs that are not done, in order, each once what it needs is there; `show` is called as time goes on.

    A job that fails does not end the others. At an interrupt or SIGTERM every process group is taken down first.
    """
    waiting = [job for job in jobs if not job.done]
    free = slots(processes, at_once)
    outcome = Outcome(finished=[job for job in jobs if job.done])
    running: list[Running] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            for job in _startable(waiting, running, outcome):
                if not free:
                    break
                waiting.remove(job)
                running.append(start(job, processes, free.pop(0), program))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.devices)
                ended_well = one.process.returncode == 0 and one.job.done
                (outcome.finished if ended_well else outcome.failed).append(one.job)
            show(running, outcome)
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        stop(running)
        signal.signal(signal.SIGTERM, before)
    return outcome


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _startable(waiting: list[Job], running: Sequence[Running], outcome: Outcome) -> Iterator[Job]:
    """Jobs whose needs are there; those whose needs nobody makes any more are moved to `skipped`."""
    makers = {one.job.product for one in running} | {job.product for job in waiting}
    for job in list(waiting):
        missing = [need for need in job.needs if not need.exists() or need in makers]
        if not missing:
            yield job
        elif not makers & set(missing):
            waiting.remove(job)
            outcome.skipped.append(job)


def start(job: Job, processes: int, devices: tuple[str, ...], program: Sequence[str] = PROGRAM) -> Running:
    """Starts the job with its output in `log.txt` of its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.starts_anew and newest_checkpoint(job.folder / "checkpoints") is None:
        (job.folder / METRICS_FILE).unlink(missing_ok=True)
    launcher = list(program)
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launcher]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    else:
        environment |= CPU_ALLOCATOR
    with (job.folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    return Running(job, process, devices)


def stop(running: Sequence[Running]) -> None:
    """Ends process groups: asked first, then killed."""
    for one in running:
        _signal(one, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(one, signal.SIGKILL)
            one.process.wait()


def _signal(one: Running, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, number)


def last_words(folder: Path) -> str:
    """The end of a job's log."""
    file = folder / LOG_FILE
    if not file.is_file():
        return ""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
