"""JSON of a user's: whatever is wrong with it is a ValueError in words. Standard library only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"
DEEPEST = 100  # levels of lists and objects; Python's own limit is that of its stack
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair of surrogates, where it has no other half


def parse_json(content: str | bytes) -> Any:
    """The value; bytes are UTF-8, perhaps behind a byte order mark.

    Raises ValueError for other text, other bytes, numbers of thousands of digits and what is nested too deep.
    """
    if isinstance(content, bytes):
        try:
            content = content.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text ({error.reason}, byte {error.start})") from None
    too_deep = f"more than {DEEPEST} deep"
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    if content.count("[") + content.count("{") > DEEPEST and _depth_exceeds(value, DEEPEST):
        raise ValueError(too_deep)
    return value


def read_json(file: Path) -> Any:
    """The value in a file. Raises ValueError, which does not name the file, also where it cannot be read."""
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        raise ValueError(str(error.strerror)) from None


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError, which does not name the file, for anything else and half a character.

    What is no text can neither name a file nor be shown.
    """
    value = read_json(file)
    check_characters(value)
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)}, no keys with values")
    return value


def check_characters(value: Any) -> None:
    """Raises ValueError where a text in the value has half of a character, a lone surrogate, which is no text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character ({error.object[error.start]!a}, {error.reason})") from None


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _within(one)]
        if not level:
            return False
    return True


def _within(value: dict[str, Any] | list[Any]) -> list[Any]:
    return value if isinstance(value, list) else list(value.values())
