"""Who is named where ranks wait: the silent one, the one behind, the busy one, and never one that ended well."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest

from gspo_moe.errors import RankError
from gspo_moe.observability.timers import Timers
from gspo_moe.parallel import heartbeat
from gspo_moe.parallel.heartbeat import Heartbeat, Note, describe

THERE = Note(7, 42, "node2", 3, "rollout", 9, waits=True, still=4.0, where=("c10d.py:1 all_reduce", "loop.py:2 _step"))


class Ended(BaseException):
    pass


def test_the_silent_rank_is_named_then_the_one_behind_then_the_busy_one() -> None:
    busy = replace(THERE, waits=False, still=61.0)
    place = "process 42 on node2 {} in step 3, phase rollout, for {} s, at c10d.py:1 all_reduce < loop.py:2 _step"
    said = describe({1: THERE, 2: busy, 3: THERE}, [3], (3, 9))
    assert said.startswith("nothing is heard any more of ranks that the others wait for (stopped, or lost): rank 3: ")
    assert place.format("waits", 4) in said
    assert "rank 1" not in said
    assert "rank 2" not in said
    said = describe({1: THERE, 2: busy, 3: replace(THERE, entered=8)}, [], (3, 9))
    assert "for which the others wait: rank 3: process" in said
    said = describe({1: THERE, 2: busy}, [], (3, 9))
    assert f"for which the others wait: rank 2: {place.format('is', 61)}. The run ends" in said
    said = describe(dict.fromkeys(range(1, 6), THERE), [], (3, 9))
    assert "in which all ranks wait: rank 1: " in said
    assert "; rank 3: " in said
    assert "; and 2 more. The run ends" in said


@pytest.mark.parametrize("end", [False, True])
def test_a_rank_that_stands_still_ends_where_another_is_silent(
    end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, over = list[RankError](), threading.Event()

    def leave(code: int) -> NoReturn:
        assert code == RankError.exit_code
        over.set()
        raise Ended  # ends the thread, as the process would

    monkeypatch.setattr(heartbeat, "complain", told.append)
    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.01)
    timers = Timers(lambda: None)
    other = tmp_path / "rank_1.json"
    watched = Heartbeat(tmp_path, 0, 2, timers, lambda: 3, timeout_seconds=0.3)
    for beat in range(10):  # the other one lives, so that standing still is no fault
        other.write_text(json.dumps(asdict(replace(THERE, beat=beat))))
        over.wait(0.08)
    assert not told
    other.write_text(json.dumps(asdict(replace(THERE, beat=99, ended=end))))
    assert over.wait(1.0 if end else 10.0) is not end
    if end:
        watched.close()
        assert json.loads((tmp_path / "rank_0.json").read_text())["ended"] is True
    else:
        assert "(stopped, or lost): rank 1: process 42 on node2 waits in step 3, phase rollout" in str(told[0])


def test_after_a_timeout_this_rank_still_counts_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.01)
    ranks = [Heartbeat(tmp_path, rank, 2, Timers(lambda: None), lambda: 3, timeout_seconds=0.6) for rank in (0, 1)]
    monkeypatch.setattr(heartbeat, "WAITING", (__file__,))  # this very thread waits
    time.sleep(0.3)
    ranks[1]._waited = True  # its collective timed out at the same time
    said = ranks[0].missing()
    assert "a collective did not finish, in which all ranks wait: rank 1: process" in said
    assert "test_heartbeat.py" in said
    for rank in ranks:
        rank.close()


def test_what_is_busy_is_counted_by_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.01)
    timers = Timers(lambda: None)
    watched = Heartbeat(tmp_path, 0, 2, timers, lambda: 1, timeout_seconds=60.0)
    with timers("rollout"):
        time.sleep(0.3)
        monkeypatch.setattr(heartbeat, "WAITING", (__file__,))
        time.sleep(0.3)
    busy = watched.busy()
    watched.close()
    assert 0.0 < busy["rollout"] < 0.6
    assert not watched.busy().get("training")
