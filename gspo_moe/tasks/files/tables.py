"""Files of records: JSON lines, JSON, Parquet and Arrow, read a record at a time where the format lets one.

pyarrow reads all that Hugging Face's `datasets` writes; that library would bring pandas, aiohttp and the hub's client.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gspo_moe.errors import DataError
from gspo_moe.packages import require
from gspo_moe.plain_json import BOM, HALF, check_characters, kind_of, parse_json

if TYPE_CHECKING:
    import pyarrow

JSON_LINES, JSON, PARQUET, ARROW = ".jsonl", ".json", ".parquet", ".arrow"
SUFFIXES = (JSON_LINES, JSON, PARQUET, ARROW)
LFS = b"version https://git-lfs"


class Table(Protocol):
    """The records of one file, numbered from 0."""

    path: Path

    def __len__(self) -> int: ...

    def row(self, number: int) -> Mapping[str, Any]:
        """Raises DataError, without the place, where it is no record."""
        ...

    def place(self, number: int) -> str:
        """Where a person finds the record."""
        ...


class JsonLines:
    """A line is a record; empty lines are none. Keeps where each begins, and reads it when asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts: list[tuple[int, int]] = []  # byte, line
        with path.open("rb") as opened:
            start = 0
            for line, text in enumerate(opened, 1):
                if text.removeprefix(BOM).strip():
                    self._starts.append((start, line))
                start += len(text)
        self._file = path.open("rb", buffering=0)
        self._end = start

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int) -> Mapping[str, Any]:
        start = self._starts[number][0]
        end = self._starts[number + 1][0] if number + 1 < len(self._starts) else self._end
        line = os.pread(self._file.fileno(), end - start, start)
        return _record(_parsed(line), may_lack=_may_lack(line))

    def place(self, number: int) -> str:
        return f"{self.path}, line {self._starts[number][1]}"


class JsonList:
    """A file that is one list of records."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes()
            self._rows, self._may_lack = _parsed(content), _may_lack(content)
        except DataError as error:
            raise DataError(f"{path}: {error}; mend it, or write one record a line into a {JSON_LINES} file") from None
        if not isinstance(self._rows, list):
            raise DataError(
                f"{path} holds {kind_of(self._rows)}, not a list of records; write one, or one record a line into a "
                f"{JSON_LINES} file"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Mapping[str, Any]:
        return _record(self._rows[number], self._may_lack)

    def place(self, number: int) -> str:
        return f"{self.path}, record {number + 1}"


class ArrowTable:
    """Parquet, or Arrow's stream or file format, which is mapped, so that only what is read takes memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require("pyarrow")
        try:
            self._table = _read_parquet(path) if path.suffix == PARQUET else _read_arrow(path)
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these two
            raise DataError(f"{path} is no readable {path.suffix} file ({error}); write it again") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> Mapping[str, Any]:
        return dict(self._table.slice(number, 1).to_pylist()[0])

    def place(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"


def open_table(path: Path) -> Table:
    """By the suffix. Raises DataError for a file that cannot be read, or without a record; ConfigError without pyarrow.

    A `.json` file may be of lines as well.
    """
    try:
        if _head(path).startswith(LFS):
            raise DataError(f"{path} only points to its content in Git LFS; run `git lfs pull` where it lies")
        if path.suffix in (PARQUET, ARROW):
            table: Table = ArrowTable(path)
        elif path.suffix == JSON and _head(path).removeprefix(BOM).lstrip()[:1] == b"[":
            table = JsonList(path)
        else:
            table = JsonLines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a file that can") from error
    if not len(table):
        raise DataError(f"{path} is empty; give a file with at least one record, or leave it out")
    return table


def _head(path: Path) -> bytes:
    with path.open("rb") as opened:
        return opened.read(1024)


def _parsed(content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise DataError(f"it is no JSON ({error})") from None


def _may_lack(content: bytes) -> bool:
    """Whether a text in it can have half of a character."""
    return HALF.search(content.decode("utf-8")) is not None


def _record(value: Any, may_lack: bool) -> Mapping[str, Any]:
    """may_lack: it can have half of a character, which is no text to a tokenizer."""
    if not isinstance(value, dict):
        raise DataError(f"it is {kind_of(value)}, not an object with columns")
    try:
        if may_lack:
            check_characters(value)
    except ValueError as error:
        raise DataError(f"it has {error}") from None
    return value


def _read_parquet(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, partitioning=None)


def _read_arrow(path: Path) -> pyarrow.Table:
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()
