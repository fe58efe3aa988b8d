"""What the sandbox costs: seconds from a program's start to its end, in bubblewrap and without, and programs a second.

    python tools/benchmark_sandbox.py [--programs 50] [--python PATH]

The program is empty, so that all that is measured is the sandbox and the interpreter's own start, which stands alone
in the first row. --python: an interpreter that an unprivileged user can read, for the row without bubblewrap.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.sandbox import ProgramTests, Sandbox, SandboxOptions, sandbox
from gspo_moe.tasks.sandbox.command import interpreter_of

KEY = "task.reward.options"


def timed(once: Callable[[], object], programs: int, workers: int) -> tuple[float, float]:
    """Median seconds of one, one after the other; and how many a second `workers` at once end."""
    once()
    seconds = []
    for _ in range(programs):
        begun = time.monotonic()
        once()
        seconds.append(time.monotonic() - begun)
    begun = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda _: once(), range(programs)))
    return statistics.median(seconds), programs / (time.monotonic() - begun)


def rows(python: str | None) -> dict[str, Callable[[], object]]:
    interpreter = interpreter_of(python, KEY)
    options = ["-I", "-B", *([] if interpreter.packages else ["-S"])]
    found: dict[str, Callable[[], object]] = {
        "python alone": lambda: subprocess.run([interpreter.executable, *options, "-c", ""], check=True)
    }
    limits = {"cpu_seconds": 60.0, "wall_seconds": 60.0, "python": python}
    assertion = ProgramTests("assert", code=("assert f(1) == 2",))
    for allowed, name in ((False, "bubblewrap"), (True, "without")):
        if allowed:
            sandbox._refusal = lambda interpreter: "left out by the benchmark"  # type: ignore[assignment]
        try:
            one = Sandbox(SandboxOptions(allow_without_bubblewrap=allowed, **limits), KEY)
        except ConfigError as error:
            print(f"{name}: {error}")
            continue
        found[f"{name}: program"] = lambda one=one: one.run("")  # type: ignore[misc]
        found[f"{name}: assertion"] = lambda one=one: one.judge(  # type: ignore[misc]
            "def f(x): return x + 1", assertion, seconds=60
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--python")
    asked = parser.parse_args()
    print(f"{'':24}{'median ms':>12}{'a second, ' + str(asked.workers) + ' at once':>24}")
    for name, once in rows(asked.python).items():
        seconds, rate = timed(once, asked.programs, asked.workers)
        print(f"{name:24}{seconds * 1000:12.1f}{rate:24.1f}")


if __name__ == "__main__":
    main()
