"""Who may write in a folder: the kernel's lock on one host, a lease between hosts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_moe.config import lease
from gspo_moe.config.lease import LOCK_FILE, hold, lost
from gspo_moe.errors import ConfigError

# Holds the folder and has a child, as trainers have reward workers, that outlives it.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from gspo_moe.config.lease import hold
hold(Path(sys.argv[1]), "logging.run_dir")
print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        before = (run / LOCK_FILE).read_text()
        try:
            with pytest.raises(
                ConfigError, match=re.escape(f"logging.run_dir={run} is in use by process {holder.pid} on")
            ):
                hold(run, "logging.run_dir")
            assert (run / LOCK_FILE).read_text() == before
            holder.kill()
            holder.wait()
            hold(run, "logging.run_dir")
            hold(run, "logging.run_dir")
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)
    assert f'"pid": {os.getpid()}' in (run / LOCK_FILE).read_text()
    second = subprocess.run(command, capture_output=True, text=True)
    assert f"is in use by process {os.getpid()} on" in second.stderr


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of this process, for each test; `no beats` of its own, and a lease of a second."""
    monkeypatch.setattr(lease, "_held", {})
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    yield
    for one in lease._held.values():
        one.file.close()


@contextlib.contextmanager
def another_host(monkeypatch: pytest.MonkeyPatch, locks: bool) -> Iterator[None]:
    """What happens inside happens on another host, whose kernel's locks are not seen here, or that has none."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as there:
        there.setattr(lease.socket, "gethostname", lambda: "elsewhere")
        there.setattr(fcntl, "flock", (lambda *_: None) if locks else no_locks)
        yield


@pytest.mark.parametrize("locks", [True, False])
def test_a_dead_hosts_folder_is_taken_and_a_live_ones_never(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / LOCK_FILE
    with another_host(monkeypatch, locks):
        hold(tmp_path, "logging.run_dir")
        there = dict(lease._held)
        assert lost() is None
    lease._held.clear()
    inode = file.stat().st_ino

    beating, sleep = iter(range(3)), lease.time.sleep

    def beat(seconds: float) -> None:
        sleep(seconds)
        if next(beating, None) == 2:
            os.utime(file)

    monkeypatch.setattr(lease.time, "sleep", beat)
    with pytest.raises(
        ConfigError, match=f"logging.run_dir={tmp_path} is in use by process {os.getpid()} on elsewhere"
    ):
        hold(tmp_path, "logging.run_dir")
    assert (file.stat().st_ino, json.loads(file.read_text())["host"]) == (inode, "elsewhere")

    hold(tmp_path, "logging.run_dir")
    assert "has not been heard of for 1 s: taken over" in caplog.text
    assert json.loads(file.read_text())["host"] != "elsewhere"
    assert lost() is None
    # The other one had only been stopped.
    mine, lease._held = lease._held, there
    assert str(lost()).startswith(f"logging.run_dir={tmp_path} was taken over by process {os.getpid()} on")
    lease._held = mine


def test_a_clean_end_lets_another_host_in_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_host(monkeypatch, locks=True):
        hold(tmp_path, "logging.run_dir")
        lease.release()
    lease._held.clear()
    monkeypatch.setattr(lease.time, "sleep", lambda _: pytest.fail("waits"))
    hold(tmp_path, "logging.run_dir")


def test_without_locks_a_process_of_this_host_counts_while_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = lease.socket.gethostname()
    with subprocess.Popen(["sleep", "60"]) as other, another_host(monkeypatch, locks=False):
        monkeypatch.setattr(lease.socket, "gethostname", lambda: here)
        (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": other.pid, "host": here, "since": "noon"}))
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on {here} since noon"):
            hold(tmp_path, "logging.run_dir")
        other.kill()
        other.wait()
        hold(tmp_path, "logging.run_dir")
