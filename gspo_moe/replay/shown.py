"""A replayed mini-batch in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gspo_moe.replay.replay import Replayed
from gspo_moe.replay.sequences import SequenceFigures

MOST = 5  # of each kind


def shown(found: Replayed) -> list[str]:
    """A line each."""
    described, broken = found.described, [one for one in found.sequences if not one.is_finite]
    return [
        f"step {described.step}, mini-batch {described.mini_batch}: {described.num_sequences} sequences, "
        f"{described.num_tokens} response tokens; weights of {found.weights}",
        f"{'':<16}{'in the run':<24}here",
        *(f"{one.name:<16}{one.run!r:<24}{one.here!r}" for one in found.figures),
        f"not finite: {_count(found.broken_weights, found.parameters)} weights, {_count(broken, len(found.sequences))} "
        f"sequences, {_count(found.broken_gradients, found.parameters)} gradients",
        *_first("weight", found.broken_weights),
        *_first("sequence", [_sequence(one) for one in broken]),
        *_first("gradient", found.broken_gradients),
        f"largest loss: sequence {_sequence(_loudest(found.sequences))}",
        "reproduced" if found.is_reproduced else "not reproduced",
    ]


def _loudest(sequences: Sequence[SequenceFigures]) -> SequenceFigures:
    """That of the largest loss; one that is not finite before all others."""
    return max(sequences, key=lambda one: math.inf if math.isnan(one.loss) else abs(one.loss))


def _count(found: Sequence[object], of: int) -> str:
    return f"{len(found)} of {of}"


def _first(kind: str, found: Sequence[str]) -> list[str]:
    more = [f"  and {len(found) - MOST} more"] if len(found) > MOST else []
    return [f"  {kind} {one}" for one in found[:MOST]] + more


def _sequence(one: SequenceFigures) -> str:
    ratio = "" if one.log_ratio is None else f"mean log-ratio {one.log_ratio:.6g}, "
    text = f"of sample {one.sample}: {ratio}loss {one.loss:.6g}"
    if one.broken is None:
        return text
    position, token, what = one.broken
    return f"{text}; first at token {position} (id {token}): {what}"
