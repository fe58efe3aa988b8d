"""Worker processes and the thread that watches them: starts, sends them work, hears them, ends those that are over.

Each has pipes of its own, so that none can spoil what others say. One thread starts them all, since the kernel ends a
worker with the thread that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from gspo_moe.config.task import RewardConfig
from gspo_moe.tasks.printing import Printed
from gspo_moe.tasks.protocol import Item
from gspo_moe.tasks.roster import Group, Load, Outcome, Roster, State
from gspo_moe.tasks.worker import AGAIN, ALL, DONE, FAILED, READY, TOOK, Job, Message, Start, run

LOOK_SECONDS = 1.0  # a worker whose children hold its pipes open ends without a word
END_SECONDS = 5.0
PIPE_TIMEOUT = (5, 0)  # seconds, microseconds; who keeps the others' deadlines waits no longer for one worker's pipe
STOPPED = "the workers were ended"
READ_BYTES = 1 << 16


@dataclass
class Worker:
    """prints: it may still write to `printed`."""

    process: SpawnProcess
    channel: Connection
    printed: Connection
    prints: bool = True

    def sources(self) -> list[Connection]:
        return [self.channel, self.printed] if self.prints else [self.channel]


class Workers:
    """Processes that do groups of items, until `stop`. Every method may be called from any thread."""

    def __init__(self, config: RewardConfig, start: Start) -> None:
        self._start, self._roster = start, Roster(config)
        self._printed = Printed(config.output_kb << 10)
        self._workers = dict[int, Worker]()
        self._count, self._stopping, self._closed, self._woken = 0, False, False, False
        self._lock = threading.RLock()
        self._wakes, self._wake = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._watch, name="reward workers", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # before multiprocessing waits for its processes, which wait for work

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job, items: Sequence[Item]) -> Group:
        """Starts to do these, soon."""
        group = Group(job, items)
        with self._lock:
            self._roster.add(group)
            if self._closed:
                self._roster.fail(STOPPED)
            self._wake_up()
        return group

    def abandon(self, groups: Sequence[Group], why: Outcome) -> None:
        """Gives what is left of these the outcome `why`, and ends the workers that are at them."""
        with self._lock:
            for group in groups:
                group.settle_rest(why)
            self._wake_up()

    def _wake_up(self) -> None:
        if not self._woken and not self._closed:
            self._woken = True
            self._wake.send_bytes(b"!")

    def show_rest(self) -> None:
        """Shows what is still to be shown of what was printed; what comes then is shown anew."""
        with self._lock:
            _show(self._printed.end())

    def stop(self) -> None:
        """Ends the workers, busy or not."""
        with self._lock:
            self._stopping = True
            self._wake_up()
        self._thread.join()
        atexit.unregister(self.stop)

    def _watch(self) -> None:
        why: Outcome = STOPPED
        try:
            while not self._stopping:
                with self._lock:
                    timeout = self._decide()
                    sources = [self._wakes, *(end for one in self._workers.values() for end in one.sources())]
                heard = set(wait(sources, timeout))
                with self._lock:
                    self._hear(heard)
        except BaseException as error:  # nobody would ever hear of these groups again
            why = f"the workers' watch failed: {type(error).__name__}: {error}"
            raise
        finally:
            with self._lock:
                for number in list(self._workers):
                    self._end(number, why)
                self._roster.fail(why)
                self._closed = True
                self._wakes.close()
                self._wake.close()

    def _decide(self) -> float | None:
        """Ends, starts and sends what is due; seconds until something more can be."""
        now, roster = time.monotonic(), self._roster
        for number in roster.unwanted():
            self._end(number, STOPPED)
        for number, why in list(roster.overdue(now)):
            self._end(number, why, again=False)
        for number in roster.surplus(now):
            self._end(number, STOPPED)
        for _ in range(roster.missing(now)):
            self._start_one(now)
        sent = [self._send(number, load) for number, load in list(roster.give(now))]
        if not all(sent):
            return 0.0
        looks = roster.missing(now) or any(one.state is not State.IDLE for one in roster.members.values())
        seconds = min(roster.wait(now), LOOK_SECONDS if looks else math.inf)
        return None if seconds == math.inf else seconds

    def _start_one(self, now: float) -> None:
        context = multiprocessing.get_context("spawn")
        number, self._count = self._count, self._count + 1
        self._roster.started(number, now)
        try:
            ours, theirs = context.Pipe()
            printed, prints = context.Pipe(duplex=False)
            _limit_waits(ours)
            with theirs, prints:
                process = context.Process(target=run, args=(self._start, theirs, prints), name="reward worker")
                process.start()
        except OSError as error:
            self._roster.lost(number, f"no process for a worker ({error})")
        else:
            self._workers[number] = Worker(process, ours, printed)

    def _send(self, number: int, load: Load) -> bool:
        """Whether it could be sent; items that cannot are to come one by one, and each alone has failed."""
        group, count = load.group, len(load.numbers)
        try:
            text = pickle.dumps(count) + pickle.dumps((group.job, [group.items[each] for each in load.numbers]))
        except Exception as error:
            why = [f"{type(error).__name__}: {error}"] if count == 1 else []
            self._roster.done(number, why, time.monotonic())
            return False
        try:
            self._workers[number].channel.send_bytes(text)
        except BlockingIOError:  # of what it has read nothing can come any more
            self._end(number, f"a worker stopped reading it for {PIPE_TIMEOUT[0]} s")
            return False
        except OSError:  # it has ended, which is heard of next
            pass
        self._roster.sent(number, time.monotonic())
        return True

    def _hear(self, heard: Collection[object]) -> None:
        if self._wakes in heard:
            self._wakes.recv_bytes()
            self._woken = False
        for number, worker in list(self._workers.items()):
            if worker.printed in heard:
                self._read(worker)
            alive = worker.process.is_alive()
            if worker.channel in heard or not alive:
                self._listen(number, worker)
            if not alive and number in self._workers:
                self._end(number, _how_it_ended(worker.process))

    def _listen(self, number: int, worker: Worker) -> None:
        try:
            while _has_more(worker.channel):
                self._take(number, worker.channel.recv())
        except (EOFError, OSError):
            worker.process.join(END_SECONDS)
            self._end(number, _how_it_ended(worker.process))
        except _FailedStart as failed:
            self._end(number, str(failed), again=False)
        except Exception as error:  # something else wrote into its pipe
            self._end(number, f"its worker said what is no message ({type(error).__name__}: {error})")

    def _take(self, number: int, message: Message) -> None:
        (kind, said), roster, now = message, self._roster, time.monotonic()
        if kind == READY:
            roster.ready(number, now)
        elif kind == FAILED:
            raise _FailedStart(f"no worker can make its task: {said}")
        elif kind == TOOK:
            roster.took(number, said, now)
        else:
            roster.done(number, {DONE: [said], ALL: said, AGAIN: []}[kind], now)

    def _read(self, worker: Worker) -> None:
        text = os.read(worker.printed.fileno(), READ_BYTES)
        worker.prints = bool(text)
        _show(self._printed.take(text))

    def _end(self, number: int, why: Outcome, *, again: bool = True) -> None:
        """Kills a worker and all of its session."""
        worker = self._workers.pop(number)
        if worker.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)  # unless it has no session of its own yet
            worker.process.kill()
            worker.process.join(END_SECONDS)
            if worker.prints and worker.printed.poll():
                self._read(worker)  # its last words
            with contextlib.suppress(ValueError):  # the kernel has not let go of it
                worker.process.close()
        worker.channel.close()
        worker.printed.close()
        self._roster.lost(number, why, again=again)


class _FailedStart(Exception):
    """A worker that said why it cannot make its task."""


def _limit_waits(channel: Connection) -> None:
    """Lets it raise OSError where the other end stops in the midst of a message."""
    end = socket.socket(fileno=channel.fileno())
    end.setblocking(True)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *PIPE_TIMEOUT))
    end.detach()


def _has_more(channel: Connection) -> bool:
    """As its `poll`, at a tenth of the cost: a message comes for each item."""
    look = select.poll()
    look.register(channel, select.POLLIN)
    return bool(look.poll(0))


def _how_it_ended(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return "its worker closed its pipe" if code is None else f"its worker ended with exit code {code}"
    named = -code in set(signal.Signals)  # most real-time signals have no name
    return f"its worker was ended by {signal.Signals(-code).name if named else f'signal {-code}'}"


def _show(text: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
