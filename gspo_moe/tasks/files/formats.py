"""From a record to a prompt: the columns of each format of public data sets, and what is wrong with a record.

verl: https://verl.readthedocs.io/en/latest/preparation/prepare_data.html; GSM8K: arXiv 2110.14168, an answer's last
line is `#### 72`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.tasks.files.columns import Columns, Record, lookup
from gspo_moe.types import Message

GSM8K_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")
FIELD = re.compile(r"\{\{|\}\}|\{([^\W\d][\w.\- ]*)\}")
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "observation": "tool", "function": "tool"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Of a message, what a template could read beside role and content and is not handed on.
UNREAD = ("tool_calls", "function_call", "reasoning_content")
Demonstration = str | tuple[Message, ...]


@dataclass(frozen=True)
class Parsed:
    """What a record says. text: of the prompt, empty with messages. used: its columns that stand in other fields."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    answer: Any = None
    demonstration: Demonstration | None = None
    tests: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    used: frozenset[str] = field(default_factory=frozenset)


def parse_plain(record: Record, columns: Columns) -> Parsed:
    """Prompts and answers by columns, of verl's rows too. Raises DataError for what makes no prompt."""
    messages, behind, text = tuple[Message, ...](), tuple[Message, ...](), ""
    used = columns.used(("answer", "demonstration", "system", "uid", "source", "tools"))
    if columns.has("messages"):
        messages, behind = _split(parse_messages(columns.value(record, "messages"), columns.paths["messages"]))
        used |= columns.used(("messages",))
    elif columns.has("prompt"):
        text, messages = _prompt(columns.value(record, "prompt"), columns.paths["prompt"])
        used |= columns.used(("prompt",))
        if columns.paths["prompt"].lower() == "instruction" and isinstance(record.get("input"), str):
            text = f"{text}\n{record['input']}" if record["input"].strip() else text
            used.add("input")
    demonstration = behind or _demonstration(columns.value(record, "demonstration"))
    return Parsed(
        text=text,
        messages=messages,
        answer=columns.value(record, "answer"),
        demonstration=demonstration or None,
        tools=_tools(columns.value(record, "tools")),
        used=frozenset(used),
    )


def parse_gsm8k(record: Record, columns: Columns) -> Parsed:
    """The number behind the last `####` is the answer, without thousands separators; all of it the demonstration."""
    parsed = parse_plain(record, columns)
    if not isinstance(parsed.answer, str) or (found := GSM8K_ANSWER.search(parsed.answer)) is None:
        raise DataError(f"its answer {_short(parsed.answer)} has no line `#### NUMBER` at its end")
    own = "demonstration" in columns.named
    return replace(
        parsed,
        answer=found[1].replace(",", ""),
        demonstration=parsed.demonstration if own else parsed.answer,
    )


def parse_aime(record: Record, columns: Columns) -> Parsed:
    """Answers are integers of 0 to 999, whose leading zeros are none of theirs."""
    parsed = parse_plain(record, columns)
    text = str(parsed.answer).strip()
    if not text.isascii() or not text.isdigit() or int(text) > 999:
        raise DataError(f"its answer {_short(parsed.answer)} is no integer from 0 to 999, as AIME's are")
    return replace(parsed, answer=str(int(text)))


def is_gsm8k(record: Record, columns: Columns) -> bool:
    answer = columns.value(record, "answer")
    return isinstance(answer, str) and GSM8K_ANSWER.search(answer) is not None


def parse_messages(value: Any, column: str) -> tuple[Message, ...]:
    """Of roles and contents, in the words of the chat templates or of ShareGPT (`from`, `value`)."""
    if isinstance(value, str):
        value = _json(value, column)
    if value is None:
        raise DataError(f"its {column} is missing or null")
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"its {column} is {_short(value)}, not a list of messages")
    return tuple(_message(one, f"{column}[{number}]") for number, one in enumerate(value))


def fill(template: str, record: Record, prompt: str) -> str:
    """`{column}` by dotted path, `{prompt}` the prompt as it is without a template; `{{` and `}}` are braces."""

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        content = prompt if found[1] == "prompt" and prompt else lookup(record, found[1])
        if content is None or isinstance(content, list | Mapping):
            raise DataError(
                f"task.data.template has {found[0]} and the record no text or number there; for braces write "
                f"{{{{{found[1]}}}}}"
            )
        return str(content)

    return FIELD.sub(value, template)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"its {where} is {_short(value)}, not a message with role and content")
    role = value.get("role", value.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise DataError(f"its {where} has the role {_short(role)}; give one of {', '.join(KNOWN_ROLES)}")
    unread = [name for name in UNREAD if value.get(name)]
    if unread:
        raise DataError(f"its {where} has {unread[0]}, which is not read; write it into the content")
    return Message(role, _content(value.get("content", value.get("value")), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    """Text, or a list of parts that are all text."""
    if isinstance(value, list):
        kinds = [one.get("type") if isinstance(one, Mapping) else None for one in value]
        other = [kind for kind in kinds if kind != "text"]
        if other:
            raise DataError(f"its {where} has a part of type {_short(other[0])}; only text can be read")
        return "".join(_content(one.get("text"), where) for one in value)
    if value is None:
        raise DataError(f"its {where} is missing or null")
    if not isinstance(value, str):
        raise DataError(f"its {where} is {_short(value)}, not text")
    return value


def _prompt(value: Any, column: str) -> tuple[str, tuple[Message, ...]]:
    if isinstance(value, list | tuple):
        return "", parse_messages(list(value), column)
    return _content(value, column), ()


def _split(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and demonstration: of messages that end with an assistant's, all before the first one, and the rest."""
    if messages[-1].role != "assistant":
        return messages, ()
    first = next(number for number, one in enumerate(messages) if one.role == "assistant")
    return messages[:first], messages[first:]


def _demonstration(value: Any) -> Demonstration | None:
    if isinstance(value, list):
        said = parse_messages(value, "demonstration")
        if said[0].role != "assistant" or said[-1].role != "assistant":
            raise DataError("its demonstration's first and last messages are not an assistant's")
        return said
    return None if value is None else str(value)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    found = _json(value, "tools") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise DataError(f"its tools are {_short(value)}, not a list of JSON schemas")
    return tuple(dict(one) for one in found)


def _json(value: str, column: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"its {column} is text that is no JSON ({error})") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
