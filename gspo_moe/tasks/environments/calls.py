"""Calls of tools in what a policy says, and the environment that answers them.

In the form `hermes`, which Qwen's chat templates teach, a call is `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>`, and several may stand in a turn. In the form `plain`, for models without a chat template, it is a line
`@name argument`; the argument of a tool of several lines goes on to the end of the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import PositiveInt

from gspo_moe.section import Section
from gspo_moe.types import Conversation, Prompt

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PLAIN = re.compile(r"^@(\w+)[ \t]*(.*)$", re.MULTILINE)
LONGEST_RESULT = 10_000  # characters of one result, a guard of the context; options set less


class ToolOptions(Section):
    """form: how calls are written. max_calls: of a conversation; more are answered with an error.

    calls_per_turn: those behind them are answered with an error. result_characters: longer results are cut off.
    """

    form: Literal["hermes", "plain"] = "hermes"
    max_calls: PositiveInt = 8
    calls_per_turn: PositiveInt = 4
    result_characters: PositiveInt = 2000


class Tool(Protocol):
    """name: by which it is called. argument: its one parameter, a string. lines: whether that may have several.

    schema: the JSON schema that a chat template shows.
    """

    name: str
    argument: str
    lines: bool

    @property
    def schema(self) -> dict[str, Any]: ...

    def call(self, argument: str, seconds: float) -> str:
        """The result, or `error: ...`, as text, within `seconds`."""
        ...


def schema(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    """Of a function with one string parameter, as OpenAI and Qwen's templates have it."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string", "description": meaning}},
        "required": [argument],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


@dataclass(frozen=True)
class Call:
    """error: why it cannot be made; then name and argument are empty."""

    name: str = ""
    argument: str = ""
    error: str | None = None


class ToolEnvironment:
    """Answers every turn that has calls with their results, a line each or more, in order; other turns end it.

    tools: the schemas for `Prompt.tools`; none in the form `plain`, whose calls no template teaches.
    seconds: for all calls of one turn.
    """

    def __init__(self, tool: Tool, options: ToolOptions, seconds: float) -> None:
        self._tool, self._options, self.seconds = tool, options, seconds
        self.tools: tuple[dict[str, Any], ...] = (tool.schema,) if options.form == "hermes" else ()

    def reset(self, prompt: Prompt) -> None:
        return None

    def step(self, prompt: Prompt, turns: Conversation) -> str | None:
        said = [self._calls(turn.text) for turn in turns if turn.role == "policy"]
        if not said or not said[-1]:
            return None
        made = sum(min(len(calls), self._options.calls_per_turn) for calls in said[:-1])
        results = list(self._results(said[-1], self._options.max_calls - made))
        text = "\n".join(results)
        return text if self._options.form == "hermes" else f"\n{text}\n"

    def _results(self, calls: Sequence[Call], left: int) -> Iterator[str]:
        options = self._options
        for number, call in enumerate(calls):
            if call.error is not None:
                yield f"error: {call.error}"
            elif number >= left:
                yield f"error: no more than {options.max_calls} calls; answer without"
            elif number >= options.calls_per_turn:
                yield f"error: no more than {options.calls_per_turn} calls a turn"
            else:
                result = self._tool.call(call.argument, self.seconds / min(len(calls), options.calls_per_turn))
                kept = min(options.result_characters, LONGEST_RESULT)
                yield result if len(result) <= kept else f"{result[:kept]}... ({len(result) - kept} characters more)"

    def _calls(self, text: str) -> list[Call]:
        return hermes_calls(text, self._tool) if self._options.form == "hermes" else plain_calls(text, self._tool)


def hermes_calls(text: str, tool: Tool) -> list[Call]:
    """The calls between tags, those that are none with what is wrong with them; a tag that is not closed is one."""
    found = []
    for piece in text.split(OPEN)[1:]:
        inner, closed, _ = piece.partition(CLOSE)
        found.append(_checked(inner, tool) if closed else Call(error=f"{OPEN} without {CLOSE}"))
    return found


def _checked(text: str, tool: Tool) -> Call:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call(error=f"the call is no JSON ({str(error)[:100]})")
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return Call(error='a call is {"name": ..., "arguments": {...}}')
    if value.get("name") != tool.name:
        return Call(error=f"there is no tool {str(value.get('name'))[:50]!r}; there is {tool.name}")
    arguments = value["arguments"]
    if arguments.keys() != {tool.argument} or not isinstance(arguments[tool.argument], str):
        return Call(error=f"{tool.name} takes one argument, {tool.argument}, a string")
    return Call(tool.name, arguments[tool.argument])


def plain_calls(text: str, tool: Tool) -> list[Call]:
    """The lines that begin with @ and a tool's name."""
    found = []
    for match in PLAIN.finditer(text):
        if match[1] != tool.name:
            found.append(Call(error=f"there is no tool {match[1][:50]!r}; there is {tool.name}"))
        elif tool.lines:
            return [*found, Call(tool.name, text[match.start(2) :])]
        else:
            found.append(Call(tool.name, match[2].strip()))
    return found
