"""Messages of a chat from JSON values, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.plain_json import parse_json
from gspo_moe.types import Message

ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "observation": "tool", "function": "tool"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Of a message, what a template could read beside role and content and is not handed on.
UNREAD = ("tool_calls", "function_call", "reasoning_content")


def read_messages(value: Any, where: str) -> tuple[Message, ...]:
    """The messages in a list of roles and contents, or in its JSON, in the words of templates or of ShareGPT.

    where: what errors call it. Raises DataError for anything else, and for what a template could read and would miss.
    """
    if isinstance(value, str):
        value = _json(value, where)
    if value is None:
        raise DataError(f"{where} is missing or null")
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where} is {shortened(value)}, not a list of messages")
    return tuple(_message(one, f"{where}[{number}]") for number, one in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {shortened(value)}, not a message with role and content")
    role = value.get("role", value.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise DataError(f"{where} has the role {shortened(role)}; give one of {', '.join(KNOWN_ROLES)}")
    unread = [name for name in UNREAD if value.get(name)]
    if unread:
        raise DataError(f"{where} has {unread[0]}, which is not read; write it into the content")
    return Message(role, read_content(value.get("content", value.get("value")), f"{where}.content"))


def read_content(value: Any, where: str) -> str:
    """Text, or a list of parts that are all text."""
    if isinstance(value, list):
        kinds = [one.get("type") if isinstance(one, Mapping) else None for one in value]
        other = [kind for kind in kinds if kind != "text"]
        if other:
            raise DataError(f"{where} has a part of type {shortened(other[0])}; only text can be read")
        return "".join(read_content(one.get("text"), where) for one in value)
    if value is None:
        raise DataError(f"{where} is missing or null")
    if not isinstance(value, str):
        raise DataError(f"{where} is {shortened(value)}, not text")
    return value


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """A list of JSON schemas, or its JSON; none of nothing. Raises DataError for anything else."""
    found = _json(value, where) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise DataError(f"{where} are {shortened(value)}, not a list of JSON schemas")
    return tuple(dict(one) for one in found)


def _json(value: str, where: str) -> Any:
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{where} is text that is no JSON ({error})") from None


def shortened(value: Any) -> str:
    """For a message: its first 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
