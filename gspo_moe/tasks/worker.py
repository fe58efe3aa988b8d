"""What runs in a reward worker: the task is made once, then items are done as they come, each answered by a message.

Whatever a task's code does to its process, the trainer hears of: an error as the item's outcome, silence and death by
the messages that do not come. `tasks.workers` is the other end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import GspoMoeError, RewardError
from gspo_moe.orphans import end_with
from gspo_moe.tasks.protocol import Item, Task
from gspo_moe.tasks.rewards import Step, give_reward, give_rewards, is_batched, prepare
from gspo_moe.types import Conversation, Prompt, Reward

MakeTask = Callable[[TaskConfig, int], Task]
Job = Callable[[Task, Prompt, Conversation], Reward | Step | str]  # a worker imports it by name; a text is an error
Message = tuple[str, Any]
# Of a worker: READY, or FAILED and why. Of what it is sent: TOOK and whether in one call, then DONE of each item and
# what came of it, or of one call ALL that came, or AGAIN where it raised, so that its items should come one by one.
READY, FAILED, TOOK, DONE, ALL, AGAIN = "ready", "failed", "took", "done", "all", "again"
OURS = str(Path(__file__).parent)
LONGEST_ERROR = 10_000  # characters; an error's text is kept in the run's folder, for every answer
SHOW_START_AT = 0.9  # of the time that a start may take, it shows where it is


@dataclass(frozen=True)
class Start:
    """What makes a worker's task. make: importable by name. config: pickled, since it is sent to each."""

    trainer: int
    make: MakeTask
    config: bytes
    seed: int


def run(start: Start, channel: Connection, printed: Connection) -> None:
    """The whole life of a worker. printed: takes what it writes to its standard streams."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(start.trainer)
    # At a signal to its group, or to a whole job, the trainer finishes its step, and needs its workers.
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.register_at_fork(after_in_child=channel.close)  # only the worker itself may answer
    streams = Streams(printed.fileno())
    try:
        config: TaskConfig = pickle.loads(start.config)
        faulthandler.dump_traceback_later(SHOW_START_AT * config.reward.start_seconds, file=2)
        task = start.make(config, start.seed)
        prepare(task.rubric)
        faulthandler.cancel_dump_traceback_later()
        limit_memory(config.reward.memory_mb)
    except BaseException as error:
        channel.send((FAILED, told(error)))
        return
    own = os.getpid()
    channel.send((READY, None))
    while True:
        try:
            load = channel.recv_bytes()
        except EOFError:
            return
        streams.renew()
        for message in messages(task, load, config.reward.largest):
            if os.getpid() != own:  # what a reward forked, and let come back from it
                os._exit(0)
            channel.send(message)
            streams.renew()


def messages(task: Task, load: bytes, largest: float) -> Iterator[Message]:
    """What to say of a load, the number of its items and then they, as it is done."""
    job: Job
    items: Sequence[Item]
    stream = io.BytesIO(load)
    count: int = pickle.load(stream)
    try:
        job, items = pickle.load(stream)
    except BaseException as error:  # of a class or a module of the user's
        yield (ALL, [told(error)]) if count == 1 else (AGAIN, None)
        return
    whole = job is give_reward and len(items) > 1 and is_batched(task.rubric)
    yield TOOK, whole
    if not whole:
        for item in items:
            yield DONE, one_outcome(task, job, item, largest)
        return
    try:
        yield ALL, [within(outcome, largest) for outcome in give_rewards(task.rubric, items)]
    except RewardError as error:  # no item's fault, so that each alone would hide it
        yield ALL, [told(error)] * len(items)
    except BaseException:
        yield AGAIN, None


def one_outcome(task: Task, job: Job, item: Item, largest: float) -> Reward | Step | str:
    """What comes of an item, whatever its task does: a task may be any code, and none of its errors may end the run."""
    try:
        return within(job(task, *item), largest)
    except BaseException as error:
        return told(error)


def within(outcome: Reward | Step | str, largest: float) -> Reward | Step | str:
    if isinstance(outcome, Reward) and abs(outcome.total) > largest:
        return f"reward gave {outcome.total!r}, which is larger than task.reward.largest={largest:g} in size"
    return outcome


def told(error: BaseException) -> str:
    """An error as text: all that it says where it is one of ours, else with the stack behind what is ours."""
    if isinstance(error, GspoMoeError):
        return shortened(f"{type(error).__name__}: {error}")
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename.startswith(OURS):
        trace = trace.tb_next
    hint = "\n(more than task.reward.memory_mb lets a worker have)" if isinstance(error, MemoryError) else ""
    return shortened("".join(traceback.format_exception(type(error), error, trace)).strip()) + hint


def shortened(text: str) -> str:
    half = LONGEST_ERROR // 2
    if len(text) <= LONGEST_ERROR:
        return text
    return f"{text[:half]}\n... {len(text) - LONGEST_ERROR} characters left out ...\n{text[-half:]}"


def limit_memory(mebibytes: int | None) -> None:
    """What the process may have beyond what it has: a request for more raises MemoryError. Its children have as much.

    Counted is what only it can write to (RLIMIT_DATA), not address space, of which libraries reserve far more.
    """
    if mebibytes is None:
        return
    held = 0
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        held = next((int(line.split()[1]) << 10 for line in status if line.startswith("VmData:")), 0)
    limit, (_, hard) = held + (mebibytes << 20), resource.getrlimit(resource.RLIMIT_DATA)
    # The hard limit stays, for a sandbox has limits of its own.
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


class Streams:
    """Standard output and error, which go to the trainer line by line, and are whole again whatever a reward does."""

    def __init__(self, target: int) -> None:
        self._target = target
        sys.stdout = sys.stderr = None  # the trainer's own
        self.renew()

    def renew(self) -> None:
        """Opens again what was closed."""
        os.dup2(self._target, 1)
        os.dup2(self._target, 2)
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                lines = os.fdopen(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
                setattr(sys, name, lines)
