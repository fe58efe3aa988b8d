"""Makes the task in the main process, which ends where that takes longer than a worker may take to start."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from gspo_moe.config.lease import release
from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.last_words import complain
from gspo_moe.tasks import make_task
from gspo_moe.tasks.protocol import Task

GRACE_SECONDS = 5.0
WATCH = "watch of the task's start"


def make_task_in_time(config: TaskConfig, seed: int) -> Task:
    """As `make_task`; after `config.reward.start_seconds` the process ends with a ConfigError that shows its place.

    An exception would not surely end the user's code, which may catch it or wait in native code. Where that lets no
    other thread run either, as `re` does, the stack alone comes, `GRACE_SECONDS` later, and exit code 1.
    """
    caller, limit, made = threading.get_ident(), config.reward.start_seconds, threading.Event()

    def watch() -> None:
        if made.wait(limit):
            return
        frames = traceback.extract_stack(sys._current_frames()[caller])
        begun = max((number for number, one in enumerate(frames) if one.filename == __file__), default=-1)
        if made.is_set():
            return
        error = ConfigError(
            f"{' and '.join(_named(config))}: the task is not made after task.reward.start_seconds={limit:g}, so that "
            "an import or a constructor hangs; mend it, or raise the limit. It is at\n"
            + "".join(traceback.format_list(frames[begun + 1 :])).rstrip()
        )
        sys.stderr = sys.__stderr__  # what hangs may have put another in its place
        try:
            complain(error)
            release()
            sys.stdout.flush()
        finally:
            os._exit(error.exit_code)

    process = os.getpid()
    try:
        threading.Thread(target=watch, name=WATCH, daemon=True).start()
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=2)
        return make_task(config, seed)
    finally:
        made.set()
        if os.getpid() == process:  # a fork has no such watch, and would wait for it
            faulthandler.cancel_dump_traceback_later()


def _named(config: TaskConfig) -> Iterator[str]:
    """The task, and what else of the user's own it is made of."""
    yield f"task.name={config.name}"
    named = [("task.reward", config.reward.name), ("task.environment", config.environment.name)]
    named += [(f"task.reward.sum[{number}]", term.name) for number, term in enumerate(config.reward.sum)]
    for split in ("train", "eval", "sft") if config.data is not None else ():
        named += [(f"task.data.{split}", file.reward) for file in getattr(config.data, split)]
    yield from dict.fromkeys(f"{key}={name}" for key, name in named if name is not None and ":" in name)
