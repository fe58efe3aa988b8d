"""A tokenizer's chat template: from the messages of a conversation to the one text that the model reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gspo_moe.data.end_tokens import read_json
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.types import Message

if TYPE_CHECKING:
    from gspo_moe.config.chat import ChatConfig
    from gspo_moe.data.tokenizers import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
HAS_GENERATION = re.compile(r"\{%-?\s*generation\b")
# What `render` says itself; no variable of a config may take its place.
OWN_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents")
DEFINED = ("raise_exception", "strftime_now", "namespace", "dict", "range")


class _Generation(Extension):
    """`{% generation %}`, with which templates say what is the assistant's: its content, between marks where wanted."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Macro) -> str:
        before, behind = getattr(self.environment, "generation_marks", ("", ""))
        return f"{before}{caller()}{behind}"


class ChatTemplate:
    """A Jinja template as transformers runs it: sandboxed, with the tokenizer's special tokens by name.

    special_tokens: by name, such as "eos_token". file: where it stands. variables: the names that it reads.
    own_names: those that it sets. has_generation: it says by `{% generation %}` what is the assistant's.
    Raises DataError where it is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], file: Path) -> None:
        self.file = file
        self._special_tokens = special_tokens
        self._environment = environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            self.variables = meta.find_undeclared_variables(parsed)
            self.own_names = {name.name for name in parsed.find_all(jinja2.nodes.Name) if name.ctx == "store"}
        except jinja2.TemplateError as error:
            raise DataError(f"{file} has a chat template that cannot be read ({error}); correct it") from error
        self.has_generation = bool(HAS_GENERATION.search(source))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        head: bool = True,
        generation_marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The conversation, and with `head` that of the assistant's next message.

        tools: JSON schemas. generation_marks: what goes before and behind each `{% generation %}` block.
        Raises DataError where it is refused.
        """
        self._environment.generation_marks = generation_marks  # type: ignore[attr-defined]
        try:
            return self._template.render(
                **{**self._special_tokens, **(variables or {})},
                messages=[asdict(message) for message in messages],
                add_generation_prompt=head,
                tools=list(tools) or None,
                documents=None,
            )
        except Exception as error:  # a template may do anything with what it is given
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template of {self.file} refuses messages of {roles} ({error}); change the task's messages, "
                "or the template"
            ) from error


def read_chat_template(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template in `chat_template.jinja`, else in `tokenizer_config.json` (of several the one called "default").

    None where there is none. Raises DataError for files that cannot be read.
    """
    file, found = folder / TEMPLATE_FILE, None
    if file.is_file():
        found = _read(file)
    else:
        file = folder / SETTINGS_FILE
        found = read_json(file).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
    return None if found is None else ChatTemplate(found, special_tokens, file)


def find_template(chat: ChatConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What `chat.template` names; None where prompts' text goes in as it is.

    Raises ConfigError for a file that is none and for settings of `chat` that nothing reads, DataError for a template
    that cannot be read.
    """
    template: ChatTemplate | None = None
    if chat.template == "auto":
        template = tokenizer.chat_template
    elif chat.template != "none":
        file = Path(chat.template)
        if not file.is_file():
            raise ConfigError(f"chat.template={chat.template} is no file; give auto, none or the path of a Jinja file")
        special = tokenizer.special
        template = ChatTemplate(_read(file), {} if special is None else special.named, file)
    variables = {} if chat.thinking is None else {"enable_thinking": f"chat.thinking={str(chat.thinking).lower()}"}
    variables |= {name: f"chat.variables.{name}" for name in chat.variables}
    if template is None:
        idle = ["chat.system"] * (chat.system is not None) + list(variables.values())
        if idle:
            raise ConfigError(
                f"{', '.join(idle)}: nothing reads it, as "
                + ("chat.template=none" if chat.template == "none" else "the tokenizer has no chat template")
                + "; leave it out, or set chat.template to a Jinja file"
            )
        return None
    unread = [key for name, key in variables.items() if name not in template.variables or name in OWN_VARIABLES]
    if unread:
        known = sorted(template.variables - template.own_names - {*OWN_VARIABLES, *DEFINED})
        raise ConfigError(
            f"{', '.join(unread)}: the chat template of {template.file} has no such variable; leave it out, or set "
            f"one of its own in chat.variables ({', '.join(known) or 'it has none'})"
        )
    return template


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no readable chat template ({error}); write it as UTF-8 text") from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As text, where Jinja's own escapes what HTML would take for markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
