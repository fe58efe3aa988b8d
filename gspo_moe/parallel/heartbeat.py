"""Where each rank is, noted every few seconds, so that a hang ends with the name of the rank that the others wait for.

A collective tells that others did not come, never which. So a thread of each rank notes its step, phase and stack in a
file that all see. A rank that has stood at one place for long reads the others' notes: one that says nothing any more
is stopped or lost; of those that speak, the ones behind in phases, or outside of any collective, are waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from gspo_moe.errors import RankError
from gspo_moe.last_words import complain
from gspo_moe.observability.timers import Timers

TICK_SECONDS = 0.2
BEAT_SECONDS = 5.0
SILENT_SECONDS = 180.0  # a disk or a file server may stand still for a minute
BEATS_TO_SEE = 2.5  # from one note of a rank to the next, with some room
SHOWN_FRAMES, SHOWN_RANKS = 5, 3
# A rank waits for others in these; anywhere else it is busy, on a GPU with work that may wait for others itself.
WAITING = (os.path.join("torch", "distributed"), "p2p_communication.py")
OURS = f"{os.sep}gspo_moe{os.sep}"
Place = tuple[tuple[object, int], ...]


@dataclass(frozen=True)
class Note:
    """What a rank says of itself.

    beat: how many notes it has made. entered: how many phases. waits: for other ranks, as far as its stack shows.
    still: seconds at the same place. where: of its stack, innermost first.
    """

    beat: int
    pid: int
    host: str
    step: int
    phase: str
    entered: int
    waits: bool
    still: float
    where: tuple[str, ...]
    ended: bool = False

    def __str__(self) -> str:
        busy = "waits" if self.waits else "is"
        return (
            f"process {self.pid} on {self.host} {busy} in step {self.step}, phase {self.phase or 'between phases'}, "
            f"for {self.still:.0f} s, at {' < '.join(self.where)}"
        )


class Heartbeat:
    """A thread beside the caller's, which is the one that it watches; nothing on a single rank.

    folder: of the notes, which all ranks see. step: the step under way.
    timeout_seconds: of collectives; a rank that is silent for as long, at most `SILENT_SECONDS`, ends the job.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, timers: Timers, step: Callable[[], int], timeout_seconds: float
    ) -> None:
        self._folder, self._rank, self._others = folder, rank, [one for one in range(world_size) if one != rank]
        self._timers, self._step = timers, step
        self._limit = min(SILENT_SECONDS, timeout_seconds)
        self._beat_seconds = min(BEAT_SECONDS, self._limit / 6)
        self._watched = threading.get_ident()
        self._place: Place = ()
        self._entered, self._since = 0, time.monotonic()
        self._waits, self._beat = False, 0
        self._where: tuple[str, ...] = ()
        self._waited = False  # in a collective that timed out: this rank's place is there, whatever it does now
        self._seen: dict[int, tuple[Note, float]] = {}
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        if self._others:
            folder.mkdir(parents=True, exist_ok=True)
            self._note()
            self._thread.start()

    def close(self) -> None:
        """Ends the thread; the last note says that this rank needs no watching."""
        self._closed.set()
        if self._others:
            self._thread.join()
            self._note(ended=True)

    def busy(self) -> Mapping[str, float]:
        """Seconds by phase, since the last call, in which this rank did not wait for others as far as is seen."""
        taken, self._busy = self._busy, defaultdict(float)
        return taken

    def missing(self) -> str:
        """Which ranks a collective that timed out was waiting for, and where they are; takes some seconds."""
        self._waited = True
        before = self._read_others()
        time.sleep(BEATS_TO_SEE * self._beat_seconds)
        notes = before | self._read_others()
        silent = [rank for rank, note in notes.items() if note == before.get(rank) and not note.ended]
        return describe(notes, silent, (self._step(), self._timers.entered))

    def _go_on(self) -> None:
        next_beat = last = time.monotonic()
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - last > self._limit / 2:  # this process was stopped itself, maybe with all others
                self._since = now
                self._seen.clear()
            elif not self._waited:
                self._sample(now, now - last)
            last = now
            if now >= next_beat:
                next_beat = now + self._beat_seconds
                self._note()
                self._look(now)

    def _sample(self, now: float, elapsed: float) -> None:
        innermost = sys._current_frames().get(self._watched)
        place = tuple((frame.f_code, frame.f_lasti) for frame in _frames(innermost))
        if place != self._place or self._timers.entered != self._entered:
            self._place, self._entered, self._since = place, self._timers.entered, now
        self._waits = innermost is not None and any(part in innermost.f_code.co_filename for part in WAITING)
        if not self._waits:
            self._busy[self._timers.phase] += elapsed

    def _note(self, *, ended: bool = False) -> None:
        self._beat += 1
        if not self._waited:
            self._where = _where(sys._current_frames().get(self._watched))
        note = Note(
            beat=self._beat,
            pid=os.getpid(),
            host=socket.gethostname(),
            step=self._step(),
            phase=self._timers.phase,
            entered=self._timers.entered,
            waits=self._waits,
            still=time.monotonic() - self._since,
            where=self._where,
            ended=ended,
        )
        try:
            self._file(self._rank).write_text(json.dumps(asdict(note)), encoding="utf-8")
        except OSError:  # a full disk, or a folder that went away: the main thread meets it too, and can say it
            return

    def _read_others(self) -> dict[int, Note]:
        notes = {}
        for rank in self._others:
            # There is none yet, or none on this host, or it is being written.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(self._file(rank).read_text(encoding="utf-8"))
                notes[rank] = Note(**{**found, "where": tuple(found["where"])})
        return notes

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.json"

    def _look(self, now: float) -> None:
        """Ends the process where another one has been silent while this one stood at one place.

        The first rank and the last look, of which one at least is not the silent one.
        """
        if self._rank not in (0, len(self._others)):
            return
        if now - self._since < 2 * self._beat_seconds:
            self._seen.clear()
            return
        before = self._seen
        # What cannot be read, as on a full disk, is no silence.
        self._seen = {
            rank: before[rank] if rank in before and note == before[rank][0] else (note, now)
            for rank, note in self._read_others().items()
        }
        late = [rank for rank, (note, since) in self._seen.items() if now - since >= self._limit and not note.ended]
        if late and now - self._since >= self._limit:
            notes = {rank: note for rank, (note, _) in self._seen.items()}
            error = RankError(describe(notes, late, (self._step(), self._timers.entered)))
            try:
                complain(error)
            finally:
                os._exit(error.exit_code)


def describe(notes: Mapping[int, Note], silent: Iterable[int], here: tuple[int, int]) -> str:
    """In words, which of the other ranks are waited for.

    silent: those from which nothing is heard any more. here: step and `entered` of this rank.
    """
    fix = "The run ends; the same command goes on from its newest checkpoint"
    gone = [f"rank {rank}: {notes[rank]}" for rank in silent]
    if gone:
        return f"nothing is heard any more of ranks that the others wait for (stopped, or lost): {_list(gone)}. {fix}"
    furthest = max([here, *((note.step, note.entered) for note in notes.values())])
    behind = [rank for rank, note in notes.items() if (note.step, note.entered) < furthest]
    busy = behind or [rank for rank, note in notes.items() if not note.waits]
    who = "for which the others wait" if busy else "in which all ranks wait"
    told = _list([f"rank {rank}: {notes[rank]}" for rank in busy or notes])
    return f"a collective did not finish, {who}: {told}. {fix}"


def _list(parts: list[str]) -> str:
    rest = f"; and {len(parts) - SHOWN_RANKS} more" if len(parts) > SHOWN_RANKS else ""
    return "; ".join(parts[:SHOWN_RANKS]) + rest


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(innermost: FrameType | None) -> tuple[str, ...]:
    """The innermost place, and the innermost ones of this project."""
    frames = list(_frames(innermost))
    shown = [*frames[:1], *(one for one in frames[1:] if OURS in one.f_code.co_filename)][:SHOWN_FRAMES]
    return tuple(f"{_short(one.f_code.co_filename)}:{one.f_lineno} {one.f_code.co_name}" for one in shown)


def _short(file: str) -> str:
    return file.rpartition("site-packages" + os.sep)[2].rpartition(OURS)[2]
