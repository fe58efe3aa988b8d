"""Signals, and the end of the time that a run may take, kept until all ranks end together. Torch-free until it checks.

A command can keep signals from its first moment, before it imports what it needs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from gspo_moe.errors import Interrupted
from gspo_moe.last_words import LAUNCHER_ERROR_FILE, is_about_another_rank

if TYPE_CHECKING:
    import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm signals every process of a job, and torchrun hands its own on: a rank gets one signal twice.
ONE_SIGNAL_SECONDS = 5.0
TIME_IS_UP = int(signal.SIGALRM)  # stands for `end_after` among the numbers that ranks exchange; none is ever sent
STDERR = 2


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
        self._begun = time.monotonic()
        self._end: float | None = None
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
        # The launcher ends this rank, as a peer has died, and knows why; what this one would say is only that it has.
        if self._received and LAUNCHER_ERROR_FILE in os.environ and error is not None and is_about_another_rank(error):
            signal.raise_signal(self._received)

    def end_after(self, minutes: float | None) -> None:
        """Lets `check` end the work once this was made so many minutes ago; None never."""
        self._end = None if minutes is None else self._begun + 60 * minutes

    def check(self) -> None:
        """Raises Interrupted on every rank where any of them is to end. Collective, but for outside of `with`."""
        from gspo_moe.parallel.stop import largest

        received = largest(self._asked()) if self._entered else 0
        if received:
            name = "schedule.exit_after" if received == TIME_IS_UP else signal.Signals(received).name
            raise Interrupted(f"ended by {name}")

    def asked(self, group: dist.ProcessGroup) -> bool:
        """Whether one of the group's ranks is to end, for work that ends early before all meet in `check`.

        Collective over the group.
        """
        from gspo_moe.parallel.reduce import most

        return bool(most(self._asked(), group)) if self._entered else False

    def _asked(self) -> int:
        late = self._end is not None and time.monotonic() >= self._end
        return self._received or (TIME_IS_UP if late else 0)

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
