"""The lines that `gspo-moe score` reads: token ids (whatever else stands in the line), text or messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.plain_json import check_characters, parse_json
from gspo_moe.tasks.messages import read_messages, read_tools

FORMS = '{"token_ids": [...]}, {"text": "..."} or {"messages": [...]}'
KINDS = ("token_ids", "text", "messages")


@dataclass(frozen=True)
class Line:
    """One sequence. answer_mask: one a token, 1 where an assistant says it or where all is text; None of token ids."""

    token_ids: tuple[int, ...]
    answer_mask: tuple[int, ...] | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """What the output says of it besides log-probs."""
        if self.answer_mask is None:
            return {}
        return {"token_ids": list(self.token_ids), "mask": list(self.answer_mask)}


def read_sequences(data: Path, vocab_size: int, longest: int, renderer: Renderer | None = None) -> Iterator[Line]:
    """The sequence of each line, in order. longest: the model's positions. renderer: None without a tokenizer.

    Raises DataError for a missing file or a line that cannot be scored.
    """
    if not data.is_file():
        raise DataError(f"{data} does not exist; give a file of lines {FORMS}")
    try:
        text = data.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{data} is not UTF-8 text ({error.reason}); give lines {FORMS}") from error
    except OSError as error:
        raise DataError(f"{data} cannot be read ({error.strerror}); give lines {FORMS}") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{data}, line {number}"
        found = _sequence(line, where, renderer)
        ids = found.token_ids
        if not ids:
            raise DataError(f"{where}: there is no token in it; give one or more")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise DataError(f"{where}: token ids must lie in [0, {vocab_size}), the vocabulary")
        if len(ids) > longest + 1:
            raise DataError(f"{where}: {len(ids)} tokens exceed the model's {longest} positions")
        yield found


def _sequence(line: str, where: str, renderer: Renderer | None) -> Line:
    try:
        values = parse_json(line)
        check_characters(values)
    except ValueError as error:
        raise DataError(f"{where}: not of the form {FORMS} ({error})") from error
    kinds = [name for name in KINDS if name in values] if isinstance(values, dict) else []
    if not kinds:
        raise DataError(f"{where}: not of the form {FORMS}")
    if kinds == ["text", "messages"]:
        raise DataError(f"{where}: text and messages are both given; leave one of them out")
    kind = kinds[0]
    if kind == "token_ids":
        ids = values[kind]
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise DataError(f"{where}: token_ids must be a list of one integer or more")
        return Line(tuple(ids))
    if renderer is None:
        raise DataError(f"{where}: {kind} needs a tokenizer and the model's folder has none; set tokenizer.path to one")
    if kind == "text":
        if not isinstance(values[kind], str):
            raise DataError(f"{where}: text must be text")
        encoded = tuple(renderer.tokenizer.encode(values[kind]))
        return Line(encoded, (1,) * len(encoded))
    return _conversation(values, where, renderer)


def _conversation(values: dict[str, Any], where: str, renderer: Renderer) -> Line:
    try:
        messages = read_messages(values["messages"], "its messages")
        tools = read_tools(values.get("tools"), "its tools")
        rendered = renderer.conversation(messages, tools)
    except (ConfigError, DataError) as error:
        raise DataError(f"{where}: {error}") from error
    return Line(rendered.token_ids, rendered.answer_mask)
