"""The records of one entry of `task.data`, as prompts."""

from __future__ import annotations

import base64
import datetime
import decimal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gspo_moe.config.data import DataConfig, DataFile
from gspo_moe.config.task import FROM_FILES
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.plain_json import DEEPEST
from gspo_moe.tasks.files.columns import Columns, Record, find_columns, listed
from gspo_moe.tasks.files.folders import files_of
from gspo_moe.tasks.files.formats import Demonstration, Parsed, fill, is_gsm8k, parse_aime, parse_gsm8k, parse_plain
from gspo_moe.tasks.files.programming import (
    is_codeforces,
    is_livecodebench,
    parse_codeforces,
    parse_livecodebench,
)
from gspo_moe.tasks.files.tables import Table, open_table
from gspo_moe.types import Message, Prompt

Parse = Callable[[Record, Columns], Parsed]
FORMATS: dict[str, Parse] = {
    "plain": parse_plain,
    "verl": parse_plain,
    "gsm8k": parse_gsm8k,
    "aime": parse_aime,
    "livecodebench": parse_livecodebench,
    "codeforces": parse_codeforces,
}
PROGRAMMING = {"livecodebench", "codeforces"}


@dataclass(frozen=True)
class Found:
    """A record as a prompt without its split. demonstration: None where it has none."""

    prompt: Prompt
    demonstration: Demonstration | None


class Reader:
    """Reads the tables of one `DataFile`; a table's columns are those of its first record.

    key: what the config calls the file, for messages. Raises ConfigError for a path that holds no records, DataError
    for files that cannot be read or are empty.
    """

    def __init__(self, file: DataFile, data: DataConfig, split: str, key: str) -> None:
        self.file = file
        self._data = data
        self._named = {**data.columns, **file.columns}
        self.tables = [open_table(path) for path in files_of(file, split, key)]
        self._formats: dict[Path, tuple[Parse, Columns]] = {}

    def rows(self) -> Iterator[tuple[int, int]]:
        """(table, row) of each record, up to the limit."""
        left = self.file.limit
        for number, table in enumerate(self.tables):
            count = len(table) if left is None else min(left, len(table))
            yield from ((number, row) for row in range(count))
            left = None if left is None else left - count

    def read(self, table: int, row: int) -> Found:
        """uid: of the record's own column, empty without one.

        Raises DataError for a record that makes no prompt, ConfigError for columns that are not there.
        """
        at = self.tables[table]
        record = at.row(row)
        parse, columns = self._format(at, record, row)
        try:
            parsed = self._templated(parse(record, columns), record)
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise error if isinstance(error, DataError) else DataError(f"it cannot be read ({error!r})") from error
        text, messages = self._with_system(parsed, columns.value(record, "system"))
        if not text.strip() and not any(message.content.strip() for message in messages):
            raise DataError("its prompt is empty")
        uid = columns.value(record, "uid")
        prompt = Prompt(
            uid="" if uid is None else str(uid),
            text=text,
            task=FROM_FILES,
            reference=self._reference(record, columns, parsed, at),
            messages=messages,
            tools=parsed.tools,
        )
        return Found(prompt, parsed.demonstration)

    def demonstration(self, table: int, row: int) -> Demonstration:
        """Raises ConfigError where there is none, or not clearly one."""
        found = self.read(table, row).demonstration
        if found is not None:
            return found
        at = self.tables[table]
        columns = self._formats[at.path][1]
        raise ConfigError(
            columns.unclear
            or f"{at.place(row)} has no demonstration for stage sft; it has {listed(at.row(row))}: name its column, "
            "task.data.columns.demonstration=NAME, or give messages that end with an assistant's"
        )

    def _format(self, table: Table, record: Record, row: int) -> tuple[Parse, Columns]:
        if table.path not in self._formats:
            columns = find_columns(record, self._named, "task.data.columns", table.place(row))
            name = _format_of(record, columns) if self.file.format == "auto" else self.file.format
            is_read = columns.has("prompt") or columns.has("messages") or self._data.template is not None
            if name not in PROGRAMMING and not is_read:
                raise ConfigError(
                    f"{table.place(row)} has no column that is known as a prompt; it has {listed(record)}: name one, "
                    "task.data.columns.prompt=NAME"
                )
            if name == "verl" and not columns.has("answer"):
                raise ConfigError(
                    f"{table.place(row)} has no reward_model.ground_truth, as verl's records have; it has "
                    f"{listed(record)}: name the answer's column, task.data.columns.answer=NAME"
                )
            self._formats[table.path] = FORMATS[name], columns
        return self._formats[table.path]

    def _templated(self, parsed: Parsed, record: Record) -> Parsed:
        """With `task.data.template` for the prompt: the text, or what the user says last."""
        template = self._data.template
        if template is None:
            return parsed
        if not parsed.messages:
            return replace(parsed, text=fill(template, record, parsed.text))
        last = parsed.messages[-1]
        if last.role != "user":
            raise DataError(f"task.data.template is for the user's words, and its last message is the {last.role}'s")
        said = Message("user", fill(template, record, last.content))
        return replace(parsed, messages=(*parsed.messages[:-1], said))

    def _with_system(self, parsed: Parsed, own: Any) -> tuple[str, tuple[Message, ...]]:
        brought = bool(parsed.messages) and parsed.messages[0].role in ("system", "developer")
        if own is not None and not isinstance(own, str):
            raise DataError("its system message is not text")
        if own and brought:
            raise DataError("it has a system column and messages with a system message; leave one of them out")
        system = own or (None if brought else self._data.system)
        if not system:
            return parsed.text, parsed.messages
        return "", (Message("system", system), *(parsed.messages or (Message("user", parsed.text),)))

    def _reference(self, record: Record, columns: Columns, parsed: Parsed, table: Table) -> dict[str, Any]:
        found = {
            "answer": _json_value(parsed.answer),
            "tests": parsed.tests,
            "row": {k: _json_value(v) for k, v in record.items() if k not in parsed.used},
            "source": columns.value(record, "source") or table.path.stem,
            "reward": self.file.reward,
        }
        return {name: value for name, value in found.items() if value is not None}


def _format_of(record: Record, columns: Columns) -> str:
    if is_livecodebench(record):
        return "livecodebench"
    if is_codeforces(record):
        return "codeforces"
    return "gsm8k" if is_gsm8k(record, columns) else "plain"


def _json_value(value: Any, depth: int = 0) -> Any:
    """What Parquet holds beyond JSON as text: times in ISO 8601, decimals as they are written, bytes in base64."""
    if depth > DEEPEST:
        raise DataError(f"a column has lists and objects more than {DEEPEST} deep within one another")
    if isinstance(value, Mapping):
        return {str(key): _json_value(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(one, depth + 1) for one in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value
