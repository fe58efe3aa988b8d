"""One process a folder: a lock that ends with its process, and a lease where that does not reach. Torch-free.

`flock` is exact on one host. On a shared file system it may be known to one host alone, or outlive a host that died. So
the holder also touches the lock file every `BEAT_SECONDS`, and one of another host that has not for `LEASE_SECONDS`,
by the file server's clock, is taken to be dead: a new file takes its place. A holder that was only stopped finds that.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from gspo_moe.errors import ConfigError, OutputError
from gspo_moe.last_words import complain

LOCK_FILE = "run.lock"
BEAT_SECONDS = 10.0
LEASE_SECONDS = 120.0  # more than a client's cache of attributes, which NFS lets be a minute old
LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Holder:
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True)
class _Held:
    """A lock of this process. name: what users call the folder, such as `logging.run_dir=runs/x`."""

    path: Path
    file: IO[str]
    name: str

    def fault(self) -> OutputError | None:
        """The error that another process has taken the folder."""
        try:
            now = self.path.open(encoding="utf-8")
        except OSError:  # the folder went away, which those who write there tell of
            return None
        with now:
            try:
                if os.path.sameopenfile(now.fileno(), self.file.fileno()):
                    return None
            except OSError as error:
                if error.errno != errno.ESTALE:  # of a file that another host has replaced
                    return None
            return OutputError(
                f"{self.name} was taken over by {_holder(now) or 'another process'}, as this one had not been heard of "
                f"for {LEASE_SECONDS:g} s; it ends, and the other goes on"
            )


_held: dict[Path, _Held] = {}


def hold(folder: Path, key: str) -> None:
    """Makes `folder` and takes it for this process until it ends, however it ends; a second call changes nothing.

    Waits for the end of another host's lease, while that is not renewed.
    key: what to call the folder, such as `logging.run_dir`. Raises ConfigError while another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / LOCK_FILE).resolve()
    if path in _held:
        return
    name = f"{key}={folder}"
    file = _take(path, name)
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()
    if not _held:
        threading.Thread(target=_beat, daemon=True).start()
        atexit.register(release)
    _held[path] = _Held(path, file, name)


def lost() -> OutputError | None:
    """The error that another process took over a folder that this one held; None while all are this one's."""
    return next((fault for held in _held.values() if (fault := held.fault()) is not None), None)


def _take(path: Path, name: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        locked = _lock(file, name)
        holder = _holder(file)
        if holder is None or holder.host == socket.gethostname():
            if locked is False or (locked is None and holder is not None and _lives(holder.pid)):
                raise _in_use(name, holder)
        elif _outlives_its_lease(path, holder, name):
            raise _in_use(name, holder)
        else:
            file.close()
            return _replace(path, name)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # another process replaced the file meanwhile


def _lock(file: IO[str], name: str) -> bool | None:
    """Whether this process has the kernel's lock; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        _log.warning("%s: no locks here (%s); a lease of %g s takes their place", name, error.strerror, LEASE_SECONDS)
        return None
    return True


def _holder(file: IO[str]) -> _Holder | None:
    """None before one has written its name, and after its end."""
    try:
        file.seek(0)
        found = json.loads(file.read())
        return _Holder(int(found["pid"]), str(found["host"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _outlives_its_lease(path: Path, holder: _Holder, name: str) -> bool:
    """Waits until another host's lease is renewed or has run out."""
    beat = path.stat().st_mtime
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".gspo_moe_") as now:
        age = os.fstat(now.fileno()).st_mtime - beat
    # Always some: the file server may have stood still itself, or hosts' clocks differ where they set the times.
    left = min(max(LEASE_SECONDS - age, 3 * BEAT_SECONDS), LEASE_SECONDS)
    end = time.monotonic() + left
    _log.warning("%s is held by %s; seeing for up to %.0f s whether it lives", name, holder, left)
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(FileNotFoundError), path.open() as file:  # opening asks the server
            if os.fstat(file.fileno()).st_mtime != beat:
                return True
    _log.warning("%s was held by %s, which has not been heard of for %g s: taken over", name, holder, LEASE_SECONDS)
    return False


def _replace(path: Path, name: str) -> IO[str]:
    """A new file in the place of a dead holder's. Of several takers the last one wins, and the others find out."""
    fresh = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
    file = fresh.open("w+", encoding="utf-8")
    _lock(file, name)
    os.replace(fresh, path)
    time.sleep(LOOK_SECONDS)
    fault = _Held(path, file, name).fault()
    if fault is not None:
        raise ConfigError(str(fault))
    return file


def _in_use(name: str, holder: _Holder | None) -> ConfigError:
    return ConfigError(
        f"{name} is in use by {holder or 'another process'}; wait for its end, end it, or name another folder"
    )


def _beat() -> None:
    while True:
        time.sleep(BEAT_SECONDS)
        for held in list(_held.values()):
            fault = held.fault()
            if fault is not None:  # it stood still, and what it writes now would mix with the other's
                try:
                    complain(fault)
                finally:
                    os._exit(fault.exit_code)
            with contextlib.suppress(OSError):
                os.utime(held.file.fileno())


def release() -> None:
    """Gives up every folder: at a clean end nobody, on whatever host, needs to wait."""
    for held in _held.values():
        with contextlib.suppress(OSError):
            held.file.truncate(0)
