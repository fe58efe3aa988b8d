from __future__ import annotations

import time

import pytest

from gspo_moe.observability.timers import Timers


def test_phases_add_up_until_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0, 24.0, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timers = Timers(lambda: None)
    with timers("rollout"):
        pass
    with timers("rollout"):
        pass
    with timers("step"), timers("training"):
        pass
    assert timers.take() == {
        "timing/rollout_seconds": 2.5,
        "timing/training_seconds": 3.0,
        "timing/step_seconds": 10.0,
    }
    assert timers.take() == {}


def test_the_device_is_waited_for_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def clock() -> float:
        order.append("clock")
        return 0.0

    monkeypatch.setattr(time, "perf_counter", clock)
    with Timers(lambda: order.append("wait"))("training"):
        order.append("work")
    assert order == ["wait", "clock", "work", "wait", "clock"]


def test_phases_that_the_catalog_lacks_are_refused() -> None:
    with pytest.raises(KeyError, match="timing/lunch_seconds"), Timers(lambda: None)("lunch"):
        pass
