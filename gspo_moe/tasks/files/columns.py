"""Columns of a record: by dotted path where the config names them, else by the names that data sets give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gspo_moe.errors import ConfigError

Record = Mapping[str, Any]

# Of the first group that a record has any of, it must have one only; names compare without case.
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages", "conversations"),),
    "prompt": (("prompt",), ("question", "problem", "instruction", "query"), ("input",)),
    "answer": (
        ("reward_model.ground_truth",),
        ("answer", "ground_truth", "final_answer", "expected_answer", "target", "label"),
        ("solution",),
    ),
    "demonstration": (("demonstration", "completion", "response", "output", "generation"), ("solution",), ("answer",)),
    "system": (("system", "system_prompt"),),
    "uid": (("uid",),),
    "source": (("data_source",),),
    "tools": (("tools",),),
}


@dataclass(frozen=True)
class Columns:
    """Dotted paths by role, those that a file has. named: the roles that the config names.

    unclear: why a demonstration has no one column, which only who wants one needs to hear.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    unclear: str | None = None

    def value(self, record: Record, role: str) -> Any:
        """None where the file has no such column, or the record nothing in it."""
        path = self.paths.get(role)
        return None if path is None else lookup(record, path)

    def used(self, roles: Iterable[str]) -> set[str]:
        """The columns that these roles take whole."""
        return {self.paths[role] for role in roles if role in self.paths}

    def has(self, role: str) -> bool:
        return role in self.paths


def find_columns(record: Record, named: Mapping[str, str], key: str, place: str) -> Columns:
    """The columns of a file whose first record is `record`.

    Raises ConfigError, with the columns that there are, for a named one that is not there, and several that would do.
    """
    paths = dict(named)
    for role, path in named.items():
        if not _has(record, path):
            raise ConfigError(f"{key}.{role}={path} is no column of {place}; it has {listed(record)}")
    # A prompt that is named is the one, whatever else there is, and so are messages.
    settled = {"prompt": {"messages"}, "messages": {"prompt"}}
    closed = {other for role in named for other in settled.get(role, ())}
    unclear = None
    for role in [role for role in NAMES if role not in paths and role not in closed]:
        fitting = _fitting(record, role)
        if len(fitting) > 1:
            fault = (
                f"{place} has several columns that may be the {role} ({', '.join(fitting)}) among {listed(record)}; "
                f"name one: {key}.{role}={fitting[0]}"
            )
            if role != "demonstration":
                raise ConfigError(fault)
            unclear = fault
        elif fitting:
            paths[role] = fitting[0]
    if not closed and "messages" in paths and paths.get("prompt", "").lower() == "prompt":
        raise ConfigError(
            f"{place} has both {paths['messages']} and {paths['prompt']} among {listed(record)}; name the one that is "
            f"the prompt: {key}.messages={paths['messages']} or {key}.prompt={paths['prompt']}"
        )
    return Columns(paths, frozenset(named), unclear)


def _fitting(record: Record, role: str) -> list[str]:
    """The columns of the first group that the record has any of."""
    for group in NAMES[role]:
        fitting = [path for name in group if (path := _spelt(record, name)) is not None]
        if fitting:
            return fitting
    return []


def lookup(record: Any, path: str) -> Any:
    """The value at a dotted path, of a column with dots in its name before others; None where there is none."""
    if isinstance(record, Mapping):
        if path in record:
            return record[path]
        head, _, rest = path.partition(".")
        return lookup(record.get(head), rest) if rest else None
    if isinstance(record, Sequence) and not isinstance(record, str):
        head, _, rest = path.partition(".")
        if head.isdigit() and int(head) < len(record):
            return lookup(record[int(head)], rest) if rest else record[int(head)]
    return None


def listed(record: Record) -> str:
    return ", ".join(map(str, record)) or "no columns"


def _has(record: Record, path: str) -> bool:
    head = path.partition(".")[0]
    return path in record or lookup(record, path) is not None or ("." not in path and head in record)


def _spelt(record: Record, name: str) -> str | None:
    """The record's own spelling of a column, None without one."""
    head, _, rest = name.partition(".")
    found = next((column for column in record if column.lower() == head), None)
    if not rest or found is None:
        return found
    return f"{found}.{rest}" if isinstance(record[found], Mapping) and rest in record[found] else None
