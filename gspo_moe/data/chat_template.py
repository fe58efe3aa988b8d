"""A tokenizer's chat template: from the messages of a conversation to the one text that the model reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gspo_moe.data.end_tokens import read_json
from gspo_moe.errors import DataError
from gspo_moe.types import Message

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the second's special tokens count


class _Generation(Extension):
    """`{% generation %}`, with which transformers finds the assistant's tokens: its content as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template as transformers runs it: sandboxed, with the tokenizer's special tokens by name.

    file: where it stands, for messages. Raises DataError where it is no template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], file: Path) -> None:
        self._file = file
        self._special_tokens = special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{file} has a chat template that cannot be read ({error}); correct it") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation and the head of the assistant's next message. Raises DataError where it is refused."""
        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template may do anything with what it is given
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template of {self._file} refuses messages of {roles} ({error}); change the task's messages, "
                "or the template"
            ) from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template in `chat_template.jinja`, else in `tokenizer_config.json` (of several the one called "default").

    None where there is none. Raises DataError for files that cannot be read.
    """
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for file in SETTINGS_FILES
        for name, value in read_json(folder / file).items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    file, found = folder / TEMPLATE_FILE, None
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    else:
        file = folder / SETTINGS_FILES[1]
        found = read_json(file).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
    return None if found is None else ChatTemplate(found, tokens, file)


def _to_json(value: Any, **options: Any) -> str:
    """As text, where Jinja's own escapes what HTML would take for markup."""
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
