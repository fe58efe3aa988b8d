"""What a fleet of servers did since the last look: pure counting, on a clock that the caller has.

Latency is an answer's, from when it is asked for to when it is there, retries included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

TAIL = 0.99  # of answers, the slowest of which a step waits for


@dataclass
class Counters:
    """answers, tokens: that came. retries: answers asked for once more. taken_out: servers found dead.

    latencies: seconds, of each answer. busy: request-seconds in flight. span: seconds in which there were any.
    most: requests in flight at once. began, since: the clock's at the last look, and when this was last brought to now.
    """

    answers: int = 0
    tokens: int = 0
    retries: int = 0
    taken_out: int = 0
    latencies: list[float] = field(default_factory=list)
    busy: float = 0.0
    span: float = 0.0
    most: int = 0
    in_flight: int = 0
    since: float = 0.0
    began: float = 0.0

    @property
    def idle(self) -> float:
        """Seconds in which nothing was in flight."""
        return self.since - self.began - self.span

    def begin(self, now: float) -> None:
        self.advance(now)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)

    def end(self, now: float) -> None:
        self.advance(now)
        self.in_flight -= 1

    def came(self, tokens: int, seconds: float) -> None:
        self.answers += 1
        self.tokens += tokens
        self.latencies.append(seconds)

    def advance(self, now: float) -> None:
        if self.in_flight:
            self.busy += self.in_flight * (now - self.since)
            self.span += now - self.since
        self.since = now

    def successor(self) -> Counters:
        """Goes on from here with nothing counted but what is in flight."""
        return Counters(in_flight=self.in_flight, most=self.in_flight, since=self.since, began=self.since)


def server_metrics(counted: Sequence[Counters], servers_up: Sequence[int]) -> dict[str, float]:
    """Of the fleets of all processes that ask; of answers nothing where none came."""
    latencies = [seconds for one in counted for seconds in one.latencies]
    span = max((one.span for one in counted), default=0.0)
    metrics = {
        "rollout/servers/up": float(min(servers_up)),
        "rollout/servers/taken_out": float(sum(one.taken_out for one in counted)),
        "rollout/servers/retries": float(sum(one.retries for one in counted)),
        "queue/idle_seconds": sum(one.idle for one in counted) / len(counted),
    }
    if not latencies or not span:
        return metrics
    median, tail = np.quantile(latencies, [0.5, TAIL])
    return metrics | {
        "rollout/servers/tokens_per_second": sum(one.tokens for one in counted) / span,
        "rollout/servers/latency_median_seconds": float(median),
        "rollout/servers/latency_tail_seconds": float(tail),
        "rollout/servers/utilisation": sum(one.busy for one in counted) / (span * sum(one.most for one in counted)),
    }
