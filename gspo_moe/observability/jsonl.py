"""JSON Lines files that survive being killed: one object with a `step` a line, cut back when a run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.files import write_whole
from gspo_moe.plain_json import parse_json


class JsonLines:
    """Appends objects to `path`, each line flushed as it is written.

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
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
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
