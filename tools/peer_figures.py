"""What `benchmark_peers.py` makes of its rounds: medians with their spread, ratios, and which goals they reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.sides import Outcome

Spread = dict[str, float]
Figures = dict[str, dict[str, Spread]]  # of a side: wall and cpu by phase, memory by what it is of
PHASES = ("step", "rollout", "old_log_probs", "forward_backward", "update", "rest")
WHOLE_STEP = {1: 2.5, 2: 4.0}  # tokens/s over TRL's, at least, by processes
GENERATION, FORWARD_BACKWARD = 3.0, 0.8


@dataclass(frozen=True)
class Ratio:
    """A figure of ours against a peer's, by medians; cpu: the same of CPU seconds, None where there are none.

    least and most: of the rounds, each with its own round's peer. peer: which of its settings was best.
    """

    name: str
    peer: str
    relation: str
    target: float | None
    wall: float
    least: float
    most: float
    cpu: float | None

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.wall >= self.target if self.relation == ">=" else self.wall <= self.target


def spread(values: Sequence[float]) -> Spread:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ours_by_phase(figures: Mapping[str, Any], clock: str) -> dict[str, float]:
    """Seconds of `benchmark_throughput.py`: of the slowest rank by the clock, of all ranks together of the CPU."""
    if clock == "cpu":
        seconds, update = dict(figures["cpu_seconds"]), figures["cpu_seconds"]["update"]
    else:
        seconds = {phase: spread["max"] for phase, spread in figures["seconds"].items()}
        update = figures["update_seconds"]["max"]
    found = {phase: seconds[phase] for phase in ("step", "rollout", "old_log_probs")}
    found |= {"forward_backward": seconds["training"] - update, "update": update}
    return found | {"rest": found["step"] - sum(found[phase] for phase in PHASES[1:-1])}


def trl_by_phase(figures: Mapping[str, Any], clock: str) -> dict[str, float]:
    seconds = figures["cpu_seconds" if clock == "cpu" else "seconds"]
    found = {phase: seconds[phase] for phase in PHASES[:-1]}
    return found | {"rest": found["step"] - sum(found[phase] for phase in PHASES[1:-1])}


def transformers_by_phase(figures: Mapping[str, Any], clock: str) -> dict[str, float]:
    found = {f"generate_{experts}": seconds[clock] for experts, seconds in figures["generate"].items()}
    return found | {"forward_backward": figures["forward_backward"][clock]}


BY_PHASE: dict[str, Callable[[Mapping[str, Any], str], dict[str, float]]] = {
    "ours": ours_by_phase,
    "trl": trl_by_phase,
    "transformers": transformers_by_phase,
}


def seconds_of(side: str, outcome: Outcome, clock: str) -> dict[str, float]:
    """Seconds a step by phase; side: its name, as `ours_2`. clock: wall or cpu."""
    return BY_PHASE[side.partition("_")[0]](outcome.figures, clock)


def figures_of(side: str, rounds: Sequence[Outcome]) -> Figures:
    """Spreads over rounds, for the file of results."""
    found: Figures = {}
    for clock in ("wall", "cpu"):
        taken = [seconds_of(side, outcome, clock) for outcome in rounds]
        found[f"{clock}_seconds"] = {phase: spread([one[phase] for one in taken]) for phase in taken[0]}
    found["memory_gib"] = {
        "together": spread([outcome.together_gib for outcome in rounds]),
        "largest": spread([outcome.largest_gib for outcome in rounds]),
    }
    return found


def ratios(rounds: Mapping[str, Sequence[Outcome]], processes: int, memory_target: float | None) -> Iterator[Ratio]:
    """Of one case; rounds: outcomes by side."""
    for count in (1, processes):
        ours = f"ours_{count}"
        where = "one thread each" if count == 1 else f"{count} processes, {count} cores"
        peers = [f"trl_{threads}" for threads in sorted({1, count})]
        target = WHOLE_STEP.get(count)
        best = min(peers, key=lambda peer: figures_of(peer, rounds[peer])["wall_seconds"]["step"]["median"])
        yield _ratio(f"whole step, tokens/s, {where}", ">=", target, rounds, (best, "step"), (ours, "step"))
        peers = [f"transformers_{threads}" for threads in sorted({1, count})]
        for phase, kind, relation, target in (
            ("rollout", "generate_", ">=", GENERATION),
            ("forward_backward", "forward_backward", "<=", FORWARD_BACKWARD),
        ):
            pair = _best(rounds, peers, kind)
            name = "generation, tokens/s" if relation == ">=" else "forward + backward, time"
            ends = (pair, (ours, phase)) if relation == ">=" else ((ours, phase), pair)
            yield _ratio(f"{name}, {where}", relation, target, rounds, *ends)
        yield _memory_ratio(f"peak memory together, {where}", memory_target, rounds[ours], best, rounds[best])


def _best(rounds: Mapping[str, Sequence[Outcome]], peers: Sequence[str], kind: str) -> tuple[str, str]:
    """The side and phase with the least median seconds among the phases that begin so."""
    medians = {
        (peer, phase): found["median"]
        for peer in peers
        for phase, found in figures_of(peer, rounds[peer])["wall_seconds"].items()
        if phase.startswith(kind)
    }
    return min(medians, key=lambda key: medians[key])


def _ratio(
    name: str,
    relation: str,
    target: float | None,
    rounds: Mapping[str, Sequence[Outcome]],
    over: tuple[str, str],
    under: tuple[str, str],
) -> Ratio:
    """Seconds of `over` by seconds of `under`, each a side and a phase."""

    def values(end: tuple[str, str], clock: str) -> list[float]:
        return [seconds_of(end[0], outcome, clock)[end[1]] for outcome in rounds[end[0]]]

    def ratio(clock: str) -> float:
        return statistics.median(values(over, clock)) / statistics.median(values(under, clock))

    pairs = [a / b for a, b in zip(values(over, "wall"), values(under, "wall"), strict=True)]
    peer, phase = over if under[0].startswith("ours") else under
    label = peer if peer.startswith("trl") else f"{peer} {phase}"
    return Ratio(name, label, relation, target, ratio("wall"), min(pairs), max(pairs), ratio("cpu"))


def _memory_ratio(
    name: str, target: float | None, ours: Sequence[Outcome], peer: str, theirs: Sequence[Outcome]
) -> Ratio:
    pairs = [a.together_gib / b.together_gib for a, b in zip(ours, theirs, strict=True)]
    median = statistics.median(one.together_gib for one in ours) / statistics.median(one.together_gib for one in theirs)
    return Ratio(name, peer, "<=", target, median, min(pairs), max(pairs), None)
