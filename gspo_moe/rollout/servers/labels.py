"""What servers are told to call weights: a number that no other weights of the run ever have, its last eight digits the
policy's version. In front of them is when the run was started or taken back, as either may repeat versions.

A server that was away may hold weights that the run has given up since, and by their label they are not the newest.
"""

from __future__ import annotations

SPAN = 10**8  # versions; labels stay below 2 ** 63, as msgpack has it


def next_label(last: int, version: int, now: float) -> int:
    """Of the weights after those labelled `last`, 0 at first; greater than that. now: seconds of the epoch."""
    label = last - policy_version(last) + version
    return label if 0 < last < label else max(int(now), last // SPAN + 1) * SPAN + version


def policy_version(label: int) -> int:
    return label % SPAN
