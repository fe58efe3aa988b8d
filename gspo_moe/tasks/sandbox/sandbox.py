"""The sandbox as rewards and environments use it: run a program, or judge it by tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.sandbox.cases import ProgramTests, same_output, same_value
from gspo_moe.tasks.sandbox.command import BUBBLEWRAP, Command, Interpreter, in_bubblewrap, in_the_open, interpreter_of
from gspo_moe.tasks.sandbox.options import SandboxOptions
from gspo_moe.tasks.sandbox.running import Ran, run, started, temporary_folder

TRIAL, TRIAL_SECONDS = "import json, socket", 30.0  # what the user of a program can read of its Python


@dataclass(frozen=True)
class Verdict:
    """How many of a program's tests passed, how many were run, and what the first failure was: `Ran.how`, `compile`
    or `wrong`, and in words."""

    passed: int
    run: int
    total: int
    failure: str | None = None
    reason: str = ""


class Sandbox:
    """Every program gets processes and a folder of its own, of which nothing is left when a call returns.

    key: what the config calls `options`, for messages. Raises ConfigError where programs cannot be run here, and where
    bubblewrap is missing or cannot work and `allow_without_bubblewrap` is false.
    """

    def __init__(self, options: SandboxOptions, key: str) -> None:
        self.options = options
        if sys.platform != "linux":
            raise ConfigError(f"{key}: programs are run on Linux only, and this is {sys.platform}; use another reward")
        self._interpreter = interpreter_of(options.python, key)
        refusal = _refusal(self._interpreter)
        self.closed = refusal is None
        if self.closed:
            return
        if not options.allow_without_bubblewrap:
            raise ConfigError(
                f"{key} runs programs, and {refusal}; install bubblewrap 0.7 or later (apt-get install bubblewrap), or "
                f"set {key}.allow_without_bubblewrap=true after reading docs/sandbox.md"
            )
        ran = self.run(TRIAL, wall_seconds=TRIAL_SECONDS)
        if ran.how != "ended":
            raise ConfigError(
                f"{key}.allow_without_bubblewrap=true: {self._interpreter.executable} does not run as an unprivileged "
                f"user here ({ran.reason}); name one outside of root's folders as {key}.python, or install bubblewrap"
            )

    def run(self, program: str, stdin: str = "", wall_seconds: float | None = None, shows_value: bool = False) -> Ran:
        """Runs a program as a script. shows_value: prints the value of an expression at its end, as a notebook does."""
        job = {"mode": "run", "shows_value": shows_value}
        ran = self._run(job, program, stdin.encode(errors="replace"), wall_seconds or self.options.wall_seconds)
        word, text = _told(ran.result)
        return replace(ran, errors=text) if word == "compile" else ran

    def judge(
        self,
        program: str,
        tests: ProgramTests,
        *,
        seconds: float,
        stop_at_failure: bool = True,
        by_lines: bool = False,
        tolerance: float = 0.0,
    ) -> Verdict:
        """Judges a program by tests, each in a process of its own, within `seconds` in all."""
        begun, passed, count, first = time.monotonic(), 0, 0, ("", "")
        limited = self._limited(tests)
        for index in range(len(tests)):
            left = seconds - (time.monotonic() - begun)
            found = ("wall", "no time is left") if left <= 0 else limited._test(program, tests, index, left)
            count += 1
            if found is None or (found[0] == "" and _right(found[1], tests, index, by_lines, tolerance)):
                passed += 1
                continue
            failure = found if found[0] else ("wrong", f"{found[1][:100]!r}")
            first = first if first[0] else (failure[0], f"test {index + 1} of {len(tests)}: {failure[1]}")
            if stop_at_failure or left <= 0 or failure[0] == "compile":
                break
        return Verdict(passed, count, len(tests), first[0] or None, first[1])

    def _limited(self, tests: ProgramTests) -> Sandbox:
        if tests.time_limit_seconds is None:
            return self
        limit = tests.time_limit_seconds
        limited = object.__new__(Sandbox)
        limited.__dict__.update(self.__dict__)
        limited.options = self.options.model_copy(
            update={"cpu_seconds": limit, "wall_seconds": limit * self.options.wall_seconds / self.options.cpu_seconds}
        )
        return limited

    def _test(self, program: str, tests: ProgramTests, index: int, left: float) -> tuple[str, str] | None:
        """None where it passed; a failure and its reason; or "" and the output, which is to be compared."""
        wall = min(left, self.options.wall_seconds)
        if tests.kind == "assert":
            return self._assert(program, tests, index, wall)
        mode = "run" if tests.kind == "stdin" else "call"
        job = {"mode": mode, "function": tests.function, "shows_value": False}
        ran = self._run(job, program, tests.inputs[index].encode(errors="replace"), wall)
        word, text = _told(ran.result)
        if word == "compile":
            return word, text
        if ran.how != "ended":
            return ran.how, ran.reason
        if tests.kind == "stdin":
            return "", ran.output
        return ("", text) if word == "value" else ("failed", "the call gave no result")

    def _assert(self, program: str, tests: ProgramTests, index: int, wall: float) -> tuple[str, str] | None:
        """The program answers in one sandbox what the tests ask in another, over two pipes."""
        to_program, from_tests = os.pipe()
        to_tests, from_program = os.pipe()
        reads, writes = os.pipe()
        serving = {"mode": "serve", "lines": [to_program, from_program], "result": writes}
        asking = {"mode": "check", "lines": [to_tests, from_tests], "function": tests.function}
        with (
            os.fdopen(reads, "rb", buffering=0) as told,
            self._command(serving, program, (to_program, from_program, writes)) as command,
            started(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        ):
            ran = self._run(asking, tests.code[index], b"", wall, (to_tests, from_tests))
            os.set_blocking(told.fileno(), False)
            compiled = _told(told.read() or b"")
        word, text = _told(ran.result)
        if word == "passed" and ran.how == "ended":
            return None
        if compiled[0] == "compile":
            return compiled
        return ("failed" if ran.how == "ended" else ran.how), text if word == "failed" else ran.reason

    def _run(
        self, job: dict[str, Any], program: str, stdin: bytes, wall: float, inherited: tuple[int, ...] = ()
    ) -> Ran:
        reads, writes = os.pipe()
        with (
            os.fdopen(reads, "rb", buffering=0),
            self._command({**job, "result": writes}, program, (*inherited, writes)) as command,
        ):
            return run(command, self.options, reads, wall, command.hold(stdin, "stdin"))

    @contextlib.contextmanager
    def _command(self, job: dict[str, Any], program: str, inherited: tuple[int, ...]) -> Iterator[Command]:
        """inherited: descriptors that the program gets, closed here once it has started."""
        text = program.encode(errors="replace")
        if self.closed:
            yield in_bubblewrap(self._interpreter, self.options, text, job, inherited)
        else:
            with temporary_folder() as folder:
                yield in_the_open(self._interpreter, self.options, text, job, inherited, folder)


def _right(found: str, tests: ProgramTests, index: int, by_lines: bool, tolerance: float) -> bool:
    expected = tests.outputs[index]
    if tests.kind == "stdin":
        return same_output(found, expected, by_lines, tolerance)
    try:
        value = json.loads(found)
    except (ValueError, RecursionError):  # of a program that wrote there itself
        return False
    return same_value(value, json.loads(expected), tolerance)


def _told(result: bytes) -> tuple[str, str]:
    """The word and the text that a job wrote; a program may have written anything there."""
    word, _, text = result.decode(errors="replace").partition(" ")
    return word, text


@functools.cache
def _refusal(interpreter: Interpreter) -> str | None:
    """Why programs cannot run in bubblewrap here; None where they can."""
    if shutil.which(BUBBLEWRAP) is None:
        return "bubblewrap (bwrap) is not installed"
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb", buffering=0):
        trial = SandboxOptions(cpu_seconds=TRIAL_SECONDS, wall_seconds=TRIAL_SECONDS)
        command = in_bubblewrap(
            interpreter, trial, b"", {"mode": "run", "shows_value": False, "result": writes}, (writes,)
        )
        ran = run(command, trial, reads, TRIAL_SECONDS, command.hold(b"", "stdin"))
    return None if ran.how == "ended" else f"bubblewrap does not work here ({ran.reason})"
