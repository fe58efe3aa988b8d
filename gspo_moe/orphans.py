"""Processes that end with the one that started them, whatever ended that one: reward workers, a launcher's ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_SECONDS = 1.0
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set for every rank, whoever calls torchrun
LAUNCHER = "GSPO_MOE_LAUNCHER"  # its pid, from launch/elastic.py


def end_with_launcher() -> None:
    """Has a rank killed once torchrun, its parent, has gone: it would go on writing where the next start writes."""
    if TORCHRUN not in os.environ:
        return
    end_with(os.getppid())
    try:
        os.kill(int(os.environ.get(LAUNCHER, os.getppid())), 0)
    except ProcessLookupError:  # before the lines above
        os._exit(1)


def end_with(parent: int) -> None:
    """Has this process killed once its parent, whose pid that is, has gone; at once if that has happened.

    On Linux the kernel does it, also where the worker hangs in native code. Elsewhere a thread looks every second.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)
