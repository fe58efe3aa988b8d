"""Calls of tools in a conversation, and what is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gspo_moe.tasks.environments.calls import ToolEnvironment, ToolOptions, schema
from gspo_moe.types import Conversation, Prompt, Turn
from tests.turns import answered

PROMPT = Prompt("train/0", "?", "t")


class Upper:
    argument = "text"

    def __init__(self, name: str = "upper", lines: bool = False) -> None:
        self.name, self.lines = name, lines

    @property
    def schema(self) -> dict[str, Any]:
        return schema(self.name, "In capitals.", "text", "any")

    def call(self, argument: str, seconds: float) -> str:
        return argument.upper()


def call(text: str, name: str = "upper") -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": {"text": text}}) + "\n</tool_call>"


def said(turns: str | Conversation, **options: Any) -> str | None:
    """options: `lines`, whether the tool takes several, and those of the environment."""
    lines = options.pop("lines", False)
    environment = ToolEnvironment(Upper(lines=lines), ToolOptions(**options), seconds=1.0)
    return environment.step(PROMPT, answered(turns) if isinstance(turns, str) else turns)


def test_calls_are_answered_in_order_and_a_turn_without_one_ends() -> None:
    assert said(f"I ask {call('a')} and {call('b</tool>')}") == "A\nB</TOOL>"
    assert said("It is A.") is None
    assert said(()) is None
    environment = ToolEnvironment(Upper(), ToolOptions(), 1.0)
    assert environment.tools[0]["function"]["parameters"]["required"] == ["text"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>{</tool_call>", "error: the call is no JSON"),
        ("<tool_call>[1]</tool_call>", 'error: a call is {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"name": "upper"}</tool_call>', "error: a call is"),
        (call("a", name="lower"), "error: there is no tool 'lower'; there is upper"),
        ('<tool_call>{"name": "upper", "arguments": {"x": "a"}}</tool_call>', "error: upper takes one argument, text"),
        ('<tool_call>{"name": "upper", "arguments": {"text": 1}}</tool_call>', "error: upper takes one argument, text"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "error: the call is no JSON"),
        ('<tool_call>{"name": "upper"', "error: <tool_call> without </tool_call>"),
    ],
)
def test_calls_that_are_none_are_answered_with_what_is_wrong(text: str, message: str) -> None:
    found = said(text)
    assert found is not None
    assert found.startswith(message)
    assert said(call("a") + text) == f"A\n{found}"


def test_calls_are_counted_over_the_conversation() -> None:
    assert said(call("a") * 3, calls_per_turn=2) == "A\nA\nerror: no more than 2 calls a turn"
    turns = (Turn("policy", call("a") * 2), Turn("environment", "A\nA"), Turn("policy", call("b") * 2))
    assert said(turns, max_calls=3) == "B\nerror: no more than 3 calls; answer without"
    assert said(turns, max_calls=2) == "\n".join(["error: no more than 2 calls; answer without"] * 2)


def test_long_results_are_cut_off() -> None:
    assert said(call("abcdef"), result_characters=4) == "ABCD... (2 characters more)"


def test_the_plain_form() -> None:
    plain: dict[str, Any] = {"form": "plain"}
    assert said("well\n@upper a b \nso", **plain) == "\nA B\n"
    assert said("@upper a\n@upper b", **plain) == "\nA\nB\n"
    assert said("@upper a\nb\n@upper c", lines=True, **plain) == "\nA\nB\n@UPPER C\n"
    assert said("@lower a", **plain) == "\nerror: there is no tool 'lower'; there is upper\n"
    assert said("mail me @ home", **plain) is None
    assert ToolEnvironment(Upper(), ToolOptions(form="plain"), 1.0).tools == ()
