"""Ends a run at the same place on every rank: what one rank found, or a signal that one of them got.

Invariant: ranks that wait for each other in collectives must leave them together, so an error of one rank alone is kept
until the next place where all of them ask.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from gspo_moe.errors import GspoMoeError, Interrupted
from gspo_moe.parallel.reduce import gather_objects, most
from gspo_moe.platform import device

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm signals every process of a job, and torchrun hands its own on: a rank gets one signal twice.
ONE_SIGNAL_SECONDS = 5.0
STDERR = 2
T = TypeVar("T")


class WorkError(RuntimeError):
    """What work of one rank raised that is neither ours nor the system's."""


def raise_everywhere(error: Exception | None) -> None:
    """Raises on every rank what the first of them found, if any did. Collective over all ranks."""
    if not largest(error is not None):
        return
    raise next(each for each in gather_objects(error) if each is not None)


def together(work: Callable[[], T]) -> T:
    """What `work` returns on this rank. Collective over all ranks.

    Where it raises on any, all raise the first one's error: those of this project and of the system, as they are, and a
    WorkError for any other, as not everything can be sent.
    """
    error: Exception | None = None
    try:
        found = work()
    except (GspoMoeError, OSError) as caught:
        error = caught
    except Exception as caught:
        error = WorkError(str(caught) or type(caught).__name__)
    raise_everywhere(error)
    return found


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns, or raises as in `together`, on the first rank, which alone does it. Collective."""
    found = [together(lambda: work() if dist.get_rank() == 0 else None)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def largest(value: int) -> int:
    """The largest of all ranks' values. Collective."""
    if dist.get_world_size() == 1:
        return value
    largest = torch.tensor(int(value), device=device().torch_device)  # of one type everywhere: a bool has another size
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def start_resource_tracker() -> None:
    """multiprocessing's process that outlives no trainer; it lets signals to its group pass, but SIGUSR1 only so."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, before)


class StopSignals:
    """While entered, keeps SIGTERM, SIGINT and SIGUSR1 until `check`; a second one ends the process at once.

    What follows within `ONE_SIGNAL_SECONDS` is the same signal by another way. SIGUSR1 is Slurm's usual warning.
    Signals reach the main thread alone: entered in another, it keeps none.
    """

    def __init__(self) -> None:
        self._received, self._since = 0, 0.0
        self._entered = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._received, self._entered = 0, True
        if threading.current_thread() is threading.main_thread():
            start_resource_tracker()
            self._before = {each: signal.signal(each, self._keep) for each in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        for each, before in self._before.items():
            signal.signal(each, before)

    def check(self) -> None:
        """Raises Interrupted on every rank where any of them got a signal. Collective, but for outside of `with`."""
        received = largest(self._received) if self._entered else 0
        if received:
            raise Interrupted(f"ended by {signal.Signals(received).name}", received)

    def asked(self, group: dist.ProcessGroup) -> bool:
        """Whether one of the group's ranks got a signal, for work that ends early before all meet in `check`.

        Collective over the group.
        """
        return bool(most(self._received, group)) if self._entered else False

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if time.monotonic() - self._since < ONE_SIGNAL_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received, self._since = number, time.monotonic()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            name = signal.Signals(number).name
            told = f"gspo-moe: {name}: the last whole step is saved, then it ends; a second signal ends it at once\n"
            os.write(STDERR, told.encode())  # print raises where the signal came in the middle of another one
