"""One signal that comes by two ways is one; a second one ends the process."""

from __future__ import annotations

import os
import signal

import pytest

from gspo_moe.parallel import signals


def test_a_signal_sent_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now, killed = [100.0], list[tuple[int, int]]()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "kill", lambda *given: killed.append(given))
    with signals.StopSignals():
        signal.raise_signal(signal.SIGUSR1)
        now[0] += signals.ONE_SIGNAL_SECONDS / 2
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert killed == []
        now[0] += signals.ONE_SIGNAL_SECONDS
        signal.raise_signal(signal.SIGTERM)
        assert killed == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    told = "gspo-moe: SIGUSR1: the last whole step is saved, then it ends; a second signal ends it at once\n"
    assert capfd.readouterr().err == told
