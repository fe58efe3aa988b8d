"""One program in the sandbox from its start until nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gspo_moe.tasks.sandbox.command import Command
from gspo_moe.tasks.sandbox.options import SandboxOptions

How = Literal["ended", "failed", "cpu", "wall", "memory", "output", "disk"]
TICK_SECONDS = 0.05  # between looks at the memory in use
GRACE_SECONDS = 2.0  # for the kernel, or the keeper of a program, to kill what is left of it
SIGNALLED = 128  # bwrap and the keeper report a signal as shells do
LARGEST_RESULT = 1 << 24


@dataclass(frozen=True)
class Ran:
    """How a program ended, and what came of it.

    how: `ended` with exit code 0, `failed` with another, or the limit that it went beyond.
    output, errors: standard streams, cut off at their limit. result: what the job wrote for its reader.
    """

    how: How
    output: str
    errors: str
    result: bytes
    code: int
    seconds: float

    @property
    def reason(self) -> str:
        """In a few words, for a person."""
        if self.how == "failed":
            last = self.errors.strip().splitlines()[-1:] or [f"exit code {self.code}"]
            return last[0][:300]
        return {"ended": "ended"}.get(self.how, f"more than its limit of {self.how}")


@dataclass
class _Watched:
    process: subprocess.Popen[bytes]
    room: dict[int, int]
    read: dict[int, bytearray] = field(default_factory=dict)
    beyond: How | None = None


@dataclass(frozen=True)
class Running:
    """first: a descriptor of the first process of the program's namespace, with which all others die; None without."""

    process: subprocess.Popen[bytes]
    first: int | None

    def end(self) -> None:
        """Kills what is left, and returns when nothing is."""
        if self.first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            ended = select.poll()
            ended.register(self.first, select.POLLIN)
            ended.poll(GRACE_SECONDS * 1000)
        elif self.process.poll() is None:  # its keeper kills the others
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def started(command: Command, stdin: int, stdout: int, stderr: int) -> Iterator[Running]:
    """The running process; nothing of it is left behind the block. The command's files are closed here."""
    try:
        process = subprocess.Popen(
            command.words,
            pass_fds=command.files,
            env={},
            cwd="/",
            start_new_session=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
    finally:
        for number in command.files:
            os.close(number)
    running = Running(process, _first(command.info))
    try:
        yield running
    finally:
        running.end()
        if running.first is not None:
            os.close(running.first)


def _first(info: int | None) -> int | None:
    """The process that bubblewrap says is the first of its namespace; None where it came to none."""
    if info is None:
        return None
    with open(info, "rb") as file:
        said = file.read()
    try:
        return os.pidfd_open(json.loads(said)["child-pid"])
    except (ValueError, ProcessLookupError):
        return None


def run(command: Command, options: SandboxOptions, result: int, wall_seconds: float, stdin: int) -> Ran:
    """Runs the command until it ends or goes beyond a limit. result: the descriptor to read the job's result from."""
    begun = time.monotonic()
    with started(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        process = running.process
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = process.stdout.fileno(), process.stderr.fileno()
        room = options.output_kb << 10
        watched = _Watched(process, {output: room, errors: room, result: LARGEST_RESULT})
        _follow(watched, begun + wall_seconds, options, command.folder)
        running.end()
        code = process.returncode
        process.stdout.close()
        process.stderr.close()
    texts = [watched.read[number].decode(errors="replace") for number in (output, errors)]
    how: How = watched.beyond or ("ended" if code == 0 else "failed")
    if how == "failed" and code == SIGNALLED + signal.SIGXCPU:
        how = "cpu"
    return Ran(how, texts[0], texts[1], bytes(watched.read[result]), code, time.monotonic() - begun)


def _follow(watched: _Watched, deadline: float, options: SandboxOptions, folder: str | None) -> None:
    """Reads until the process has ended, or sets `beyond`."""
    pid = watched.process.pid
    ended = os.pidfd_open(pid)
    look = time.monotonic() + TICK_SECONDS
    with selectors.DefaultSelector() as selector, contextlib.closing(open(ended, "rb", buffering=0)):
        for number in watched.room:
            watched.read[number] = bytearray()
            selector.register(number, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while watched.beyond is None:
            now = time.monotonic()
            if now >= deadline:
                watched.beyond = "wall"
                return
            ready = {key.fd for key, _ in selector.select(min(deadline - now, TICK_SECONDS))}
            for number in ready - {ended}:
                _read(watched, number, selector)
            if ended in ready and not ready - {ended}:  # all that it wrote has been read
                return
            if time.monotonic() >= look:
                look = time.monotonic() + TICK_SECONDS
                watched.beyond = watched.beyond or _over(pid, options, folder)


def _read(watched: _Watched, number: int, selector: selectors.BaseSelector) -> None:
    chunk = os.read(number, 1 << 16)
    if not chunk:
        selector.unregister(number)
    watched.read[number] += chunk
    if len(watched.read[number]) > watched.room[number]:
        del watched.read[number][watched.room[number] :]
        watched.beyond = "output"


def _over(pid: int, options: SandboxOptions, folder: str | None) -> How | None:
    if sum(map(_resident, descendants(pid))) > options.memory_mb << 20:
        return "memory"
    if folder is not None and _stored(Path(folder)) > options.disk_mb << 20:
        return "disk"
    return None


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, as far as they live."""
    found: list[int] = []
    ahead = [pid]
    while ahead:
        here = ahead.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{here}/task"):
                more = [int(one) for one in Path(f"/proc/{here}/task/{thread}/children").read_text().split()]
                found += more
                ahead += more
    return found


def _resident(pid: int) -> int:
    """Bytes in memory that no file stands for."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _stored(folder: Path) -> float:
    """Bytes on disk; endless where a folder cannot be looked into, because it is closed or its path too long."""
    total, ahead = 0, [str(folder)]
    while ahead:
        try:
            with os.scandir(ahead.pop()) as entries:
                for entry in entries:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        ahead.append(entry.path)
        except FileNotFoundError:  # removed since
            continue
        except OSError:
            return math.inf
    return total


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """For a program without bubblewrap; whatever it left there is removed, as far as it can be."""
    folder = tempfile.mkdtemp(prefix="sandbox")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # closed folders, or one in another beyond Python's depth
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, folder], stderr=subprocess.DEVNULL, check=False)
