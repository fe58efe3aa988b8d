"""Messages of a chat from JSON values."""

from __future__ import annotations

from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.types import Message

KEYS = {"role", "content"}


def read_messages(values: Any, where: str) -> tuple[Message, ...]:
    """The messages in a list of objects `{"role": ..., "content": ...}`, both of them text.

    where: what to call it in messages. Raises DataError for anything else, and for other keys, which would be lost.
    """
    if not isinstance(values, list) or not values:
        raise DataError(f'{where}: messages must be a list of one {{"role": ..., "content": ...}} or more')
    for number, one in enumerate(values):
        if not isinstance(one, dict) or not one.keys() >= KEYS or not all(isinstance(one[key], str) for key in KEYS):
            raise DataError(f"{where}: message {number} (from 0) must have role and content, both of them text")
        if unknown := sorted(one.keys() - KEYS):
            raise DataError(f"{where}: message {number} (from 0) has {unknown[0]}, which is not read; leave it out")
    return tuple(Message(one["role"], one["content"]) for one in values)
