"""JSON Lines files that survive being killed: one object with a `step` a line, cut back when a run continues."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.files import write_whole
from gspo_moe.plain_json import parse_json

_log = logging.getLogger(__name__)


class JsonLines:
    """Appends objects to `path`, each line whole and at once; one that the system does not take waits for the next try.

    A warning tells of the first that waits, and `flush` raises while there are any.
    resume_step: the step of the checkpoint that the run continues from. What an earlier attempt wrote after it, and a
    last line that was torn by the kill, are cut away at once; 0 means no checkpoint: the file starts anew.
    Raises DataError when the existing file is damaged elsewhere.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step and path.exists():
            kept = [record for record in read_json_lines(path)[0] if record["step"] <= resume_step]
        write_whole(path, "".join(_line(record) for record in kept))
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._whole = path.stat().st_size  # bytes of whole lines
        self._waiting: list[bytes] = []

    def append(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(_line(record).encode())
        try:
            self.flush()
        except OSError as error:
            if len(self._waiting) == 1:
                _log.warning("%s: %s; its lines are kept in memory until it takes them", self._path, error.strerror)

    def flush(self) -> None:
        """Raises OSError where lines must go on waiting."""
        while self._waiting:
            if self._file.tell() != self._whole:  # behind a line that was torn
                self._file.truncate(self._whole)
                self._file.seek(self._whole)
            line = self._waiting[0]
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            self._whole += len(line)
            self._waiting.pop(0)

    def is_gone(self) -> bool:
        """Whether something else, or nothing, stands where the file was."""
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except OSError as error:  # others pass, or a save meets them
            return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.flush()
        if self._waiting:
            _log.error("%s: %d lines could not be written and are lost", self._path, len(self._waiting))
        self._file.close()


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of the file, and what was wrong with it in words: a torn last line is left out and reported.

    Raises DataError, naming the line, for any other line that is not an object with an integer `step`.
    """
    records: list[dict[str, Any]] = []
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            if number > len(lines):
                return records, [f"{path}, line {number}: the last line is torn and was left out"]
            raise DataError(f"{path}, line {number} is not JSON: {line[:60]!r}; mend or remove that line") from None
        if not isinstance(record, dict) or not _is_step(record.get("step")):
            raise DataError(f"{path}, line {number} is not an object with an integer step; mend or remove that line")
        records.append(record)
    return records, []


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
