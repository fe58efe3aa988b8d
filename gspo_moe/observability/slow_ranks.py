"""Tells, once for each, of ranks that the others keep waiting for."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median_low

SEEN_SECONDS = 60.0  # of the busiest rank's work, before anything is said: what is sampled needs as much
BOUND = 1.5
_log = logging.getLogger(__name__)


class SlowRanks:
    """Adds up each rank's busy seconds by phase over steps. Warns, on the process that calls it, where one exceeds
    `BOUND` times the median (of two ranks, the other)."""

    def __init__(self) -> None:
        self._by_rank: list[defaultdict[str, float]] = []
        self._steps = 0
        self._told: set[int] = set()

    def add(self, by_rank: Sequence[Mapping[str, float]]) -> None:
        """by_rank: of one step, for each rank the seconds by phase in which it did not wait for others."""
        self._by_rank = self._by_rank or [defaultdict(float) for _ in by_rank]
        for total, step in zip(self._by_rank, by_rank, strict=True):
            for phase, seconds in step.items():
                total[phase] += seconds
        self._steps += 1
        sums = [sum(total.values()) for total in self._by_rank]
        slowest = sums.index(max(sums))
        if sums[slowest] < SEEN_SECONDS:
            return
        usual = median_low(sums)
        if sums[slowest] > BOUND * usual and slowest not in self._told:
            self._told.add(slowest)
            phases = self._by_rank[slowest]
            worst = max(phases, key=lambda phase: phases[phase] - median_low([one[phase] for one in self._by_rank]))
            _log.warning(
                "rank %d is slow, and the others wait for it: in the last %d steps it worked for %.1f s, the median "
                "rank for %.1f s; most of that is in phase %s (%.1f s and %.1f s)",
                slowest,
                self._steps,
                sums[slowest],
                usual,
                worst or "between phases",
                phases[worst],
                median_low([one[worst] for one in self._by_rank]),
            )
        self._by_rank, self._steps = [], 0
