"""Environments by name, in a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Turn
from tests.sandboxes import sandbox
from tests.turns import answered

ROOT = Path(__file__).parents[4]


def task(environment: Any, name: str = "sort_letters", timeout: float = 10.0) -> Task:
    values = {"name": name, "environment": environment, "reward": {"timeout_seconds": timeout}}
    return make_task(TaskConfig.model_validate(values), seed=1)


def test_every_prompt_gets_the_tools() -> None:
    plain, found = task({"name": None}), task("calculator")
    assert plain.single_turn
    assert not found.single_turn
    assert found.prompts.size("eval") is None
    for split in ("train", "eval"):
        prompt = found.prompts.prompt(split, 3)
        assert prompt.text == plain.prompts.prompt(split, 3).text
        assert [tool["function"]["name"] for tool in prompt.tools] == ["calculator"]
    assert task({"name": "calculator", "options": {"form": "plain"}}).prompts.prompt("eval", 0).tools == ()


def test_python_shows_what_is_printed_and_the_last_value() -> None:
    closed = sandbox("either").closed
    options = {} if closed else {"allow_without_bubblewrap": True, "python": "/usr/bin/python3"}
    found = task({"name": "python", "options": {**options, "wall_seconds": 4.5}})
    prompt = found.prompts.prompt("train", 0)

    def said(*programs: str) -> str | None:
        calls = [json.dumps({"name": "python", "arguments": {"code": program}}) for program in programs]
        return found.environment.step(prompt, answered("".join(f"<tool_call>{call}</tool_call>" for call in calls)))

    assert said("x = 6\nprint('six')\nx * 7") == "six\n42"
    assert said("x = 1", "x") == "(no output)\nerror: NameError: name 'x' is not defined"
    assert said("1 +", "None") == "error: SyntaxError: invalid syntax (program.py, line 1)\n(no output)"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("calculater", r"task\.environment\.name=calculater is unknown; the nearest is calculator; known are calc"),
        ({"options": {"form": "plain"}}, r"task\.environment\.options are given without task\.environment\.name"),
        ({"name": "calculator", "options": {"forms": 1}}, r"unknown key task\.environment\.options\.forms=1"),
        ({"name": "python", "options": {"total_seconds": 10}}, r"total_seconds=10 is not below task\.reward\.timeout"),
        ("own.py:Half", r"own\.py:Half gave a Half without step; an environment has reset"),
        ({"name": "own.py:Half", "options": {"a": 1}}, r"own\.py:Half with .* failed \(TypeError: .*; correct the"),
    ],
)
def test_what_is_no_environment_is_refused(
    environment: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text("class Half:\n    def reset(self, prompt): return None\n")
    monkeypatch.chdir(tmp_path)
    if "python" in str(environment):
        sandbox("bubblewrap")
    with pytest.raises(ConfigError, match=message):
        task(environment)


def test_an_environment_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
class Echo:
    tools = ({"type": "function", "function": {"name": "echo"}},)
    def __init__(self, word="hello"): self.word = word
    def reset(self, prompt): return self.word
    def step(self, prompt, turns): return None
"""
    (tmp_path / "echo.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    found = task({"name": "echo.py:Echo", "options": {"word": "go"}})
    prompt = found.prompts.prompt("train", 0)
    assert found.environment.reset(prompt) == "go"
    assert prompt.tools[0]["function"]["name"] == "echo"


def test_the_example_is_solved_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = {"form": "plain", "max_operations": 1, "max_calls": 2}
    found = task({"name": "calculator", "options": options}, name="examples/tools/steps.py:steps")
    for index in range(6):
        prompt = found.prompts.prompt("eval", index)
        first, second, third, signs = (prompt.reference[key] for key in ("first", "second", "third", "operators"))
        turns = answered(f"@calculator {first}{signs[0]}{second}")
        middle = eval(f"{first}{signs[0]}{second}")
        said = found.environment.step(prompt, turns)
        assert said == f"\n{middle}\n"
        turns = (*turns, Turn("environment", said), *answered(f"@calculator {middle}{signs[1]}{third}"))
        last = found.environment.step(prompt, turns)
        assert last == f"\n{eval(prompt.text[:-1])}\n"
        turns = (*turns, Turn("environment", last), *answered(last.strip()))
        assert found.environment.step(prompt, turns) is None
        assert found.rubric.reward(prompt, turns) == {"reward": 1.0, "calls": 2.0, "errors": 0.0}
    demonstrations = {found.prompts.prompt("sft", index).reference["turns"] for index in range(20)}
    assert demonstrations == {0, 1, 2}
