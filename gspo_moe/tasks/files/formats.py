"""From a record to a prompt: the columns of each format of public data sets, and what is wrong with a record.

verl: https://verl.readthedocs.io/en/latest/preparation/prepare_data.html; GSM8K: arXiv 2110.14168, an answer's last
line is `#### 72`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.tasks.files.columns import Columns, Record, lookup
from gspo_moe.tasks.messages import read_content, read_messages, read_tools, shortened
from gspo_moe.types import Message

GSM8K_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")
FIELD = re.compile(r"\{\{|\}\}|\{([^\W\d][\w.\- ]*)\}")
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
        messages, behind = _split(read_messages(columns.value(record, "messages"), _its(columns, "messages")))
        used |= columns.used(("messages",))
    elif columns.has("prompt"):
        text, messages = _prompt(columns.value(record, "prompt"), _its(columns, "prompt"))
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
        tools=read_tools(columns.value(record, "tools"), "its tools"),
        used=frozenset(used),
    )


def parse_gsm8k(record: Record, columns: Columns) -> Parsed:
    """The number behind the last `####` is the answer, without thousands separators; all of it the demonstration."""
    parsed = parse_plain(record, columns)
    if not isinstance(parsed.answer, str) or (found := GSM8K_ANSWER.search(parsed.answer)) is None:
        raise DataError(f"its answer {shortened(parsed.answer)} has no line `#### NUMBER` at its end")
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
        raise DataError(f"its answer {shortened(parsed.answer)} is no integer from 0 to 999, as AIME's are")
    return replace(parsed, answer=str(int(text)))


def is_gsm8k(record: Record, columns: Columns) -> bool:
    answer = columns.value(record, "answer")
    return isinstance(answer, str) and GSM8K_ANSWER.search(answer) is not None


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


def _its(columns: Columns, name: str) -> str:
    return f"its {columns.paths[name]}"


def _prompt(value: Any, where: str) -> tuple[str, tuple[Message, ...]]:
    if isinstance(value, list | tuple):
        return "", read_messages(value, where)
    return read_content(value, where), ()


def _split(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and demonstration: of messages that end with an assistant's, all before the first one, and the rest."""
    if messages[-1].role != "assistant":
        return messages, ()
    first = next(number for number, one in enumerate(messages) if one.role == "assistant")
    return messages[:first], messages[first:]


def _demonstration(value: Any) -> Demonstration | None:
    if isinstance(value, list):
        said = read_messages(value, "its demonstration")
        if said[0].role != "assistant" or said[-1].role != "assistant":
            raise DataError("its demonstration's first and last messages are not an assistant's")
        return said
    return None if value is None else str(value)
