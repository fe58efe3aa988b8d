"""Counts how often the host waits for the device, by the function that makes it wait."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
# Frames of these are how, not why: torch itself, this folder, and what wraps calls.
SKIPPED = ("/torch/", "/tests/pretend_cuda/", "/contextlib.py", "/functools.py", "<frozen", "<string>")
DEPTH = 6

counts: Counter[tuple[str, str]] = Counter()
launches: Counter[str] = Counter()  # of operations that change or make numbers, by name


def wait(kind: str) -> None:
    """Notes one wait of this kind, with the lines that led to it, innermost first."""
    counts[kind, " < ".join(_lines(sys._getframe(1)))] += 1


def _lines(frame: FrameType | None) -> Iterator[str]:
    found = 0
    while frame is not None and found < DEPTH:
        code = frame.f_code
        if not any(part in code.co_filename for part in SKIPPED):
            found += 1
            yield f"{_short(code.co_filename)}:{frame.f_lineno}:{code.co_qualname}"
        frame = frame.f_back


def _short(path: str) -> str:
    _, found, behind = path.rpartition("/site-packages/")
    return behind if found else path.removeprefix(f"{ROOT}/")


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Fills the yielded counter, at the end, with the waits of the block: (kind, lines) to their number."""
    before = counts.copy()
    found: Counter[tuple[str, str]] = Counter()
    yield found
    found.update(counts - before)


def by_function(found: Counter[tuple[str, str]]) -> dict[str, int]:
    """Waits by `kind file:function`, the innermost; line numbers are left out, which change with every edit."""
    summed: Counter[str] = Counter()
    for (kind, lines), count in found.items():
        file, _, function = lines.split(" < ")[0].split(":")
        summed[f"{kind} {file}:{function}"] += count
    return dict(sorted(summed.items()))
