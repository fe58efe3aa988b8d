"""One line for a rank that works for longer than the others, and none for an even run."""

from __future__ import annotations

import pytest

from gspo_moe.observability.slow_ranks import SlowRanks


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_slow_rank_and_its_phase_are_named_once(ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowRanks()
    for _ in range(30):
        slow.add([{"rollout": 1.0, "training": 1.4} for _ in range(ranks)])
    assert caplog.messages == []
    slow = SlowRanks()
    for _ in range(60):
        slow.add([{"rollout": 1.0, "training": 1.0 if rank else 3.0} for rank in range(ranks)])
    assert caplog.messages == [
        "rank 0 is slow, and the others wait for it: in the last 15 steps it worked for 60.0 s, the median rank for "
        "30.0 s; most of that is in phase training (45.0 s and 15.0 s)"
    ]
