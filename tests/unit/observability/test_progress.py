from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from gspo_moe.observability.progress import Progress, show_header

METRICS = {
    "reward/mean": 0.25,
    "clip_fraction/sequence": 0.321,
    "routing/staleness/slot_change": 0.0025,
    "throughput/tokens_per_second": 2512.0,
    "loss/policy": 1.0,
}


def _run(*, terminal: bool, total: int = 100, done: int = 0, enabled: bool = True) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160)
    with Progress(total, done=done, enabled=enabled, console=console) as progress:
        for step in range(done + 1, total + 1):
            progress.update(step, METRICS)
    return stream.getvalue()


def test_without_a_terminal_a_plain_line_a_step() -> None:
    lines = _run(terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(1, 101)]
    assert lines[-1] == "step 100/100  0:00:00 left  reward 0.250  clipped 32.1%  slot change 0.25%  tokens/s 2,512"


def test_rewards_that_failed_are_shown_where_there_are_any() -> None:
    stream = io.StringIO()
    with Progress(2, console=Console(file=stream, width=160)) as progress:
        progress.update(1, {"reward/mean": 0.5, "reward/failure_rate": 0.0})
        progress.update(2, {"reward/mean": 0.0, "reward/failure_rate": 1.0})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("reward 0.500")
    assert second.endswith("reward 0.000  FAILED REWARDS 100.0%")


def test_a_continued_run_shows_its_own_steps() -> None:
    lines = _run(terminal=False, total=25, done=21).splitlines()
    assert [line.split()[1] for line in lines] == ["22/25", "23/25", "24/25", "25/25"]


def test_the_header_is_a_line_a_row() -> None:
    stream = io.StringIO()
    show_header([("run", "runs/[a]"), ("device", "x" * 300)], stream)
    assert stream.getvalue() == f"run     runs/[a]\ndevice  {'x' * 300}\n"


def test_a_terminal_gets_a_bar_with_the_figures() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", _run(terminal=True))
    assert "100/100" in text
    assert "slot change 0.25%" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_silence_when_not_enabled(terminal: bool) -> None:
    assert _run(terminal=terminal, enabled=False) == ""


def test_time_left_is_steps_left_at_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 130.0])
    monkeypatch.setattr("gspo_moe.observability.progress.time.monotonic", lambda: next(now))
    stream = io.StringIO()
    with Progress(100, done=40, console=Console(file=stream, width=160)) as progress:
        progress.update(50, {})
    assert "step 50/100  0:02:30 left" in stream.getvalue()
