"""tools/benchmark_recorder.py times functions by their names, which must not outlive them."""

from __future__ import annotations

from tools.benchmark_recorder import calls


def test_what_is_timed_is_there() -> None:
    for owner, name in (*calls(audit=False), *calls(audit=True)):
        assert callable(getattr(owner, name))
