"""Curves for TensorBoard, a copy of metrics.jsonl: where they cannot be written, the run goes on without them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class TensorBoard:
    """folder: gets the event files. resume_step: what an earlier attempt wrote after it is hidden; 0 starts anew."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, not above: one rank of a run needs it

        self._folder = folder
        before = set(threading.enumerate())
        self._writer: Any = SummaryWriter(log_dir=str(folder), purge_step=resume_step + 1 if resume_step else 0)
        _keep_quiet(set(threading.enumerate()) - before)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        _log.warning(
            "%s cannot be written (%s): no more curves for TensorBoard until the next start; metrics.jsonl goes on",
            self._folder,
            error.strerror,
        )


def _keep_quiet(writers: set[threading.Thread]) -> None:
    """Of errors that TensorBoard's thread raises, which the next `write` or `close` raises as well."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread not in writers or not issubclass(arguments.exc_type, OSError):
            before(arguments)

    threading.excepthook = hook
