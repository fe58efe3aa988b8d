"""Wall time by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gspo_moe.observability.catalog import describe


class Timers:
    """`with timers("rollout"): ...` adds up seconds a phase; phases may nest and repeat.

    synchronize: called at both ends of a phase, to wait for queued device work.
    phase: the innermost one under way, empty between phases. entered: how many were begun.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.phase, self.entered = "", 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Raises KeyError for a phase that the catalog does not have."""
        name = describe(f"timing/{phase}_seconds").name
        outer, self.phase = self.phase, phase
        self.entered += 1
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
            self._synchronize()
            self._seconds[name] += time.perf_counter() - start
        finally:
            self.phase = outer

    def take(self) -> dict[str, float]:
        """`timing/<phase>_seconds` of every phase since the last call, and starts over."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken
