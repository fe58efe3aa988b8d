"""The reward `code`: what is taken from an answer, what it gives, and what is refused before a run."""

from __future__ import annotations

from typing import Any

import pytest

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.rubrics.code import Code, given_tests, program_in
from gspo_moe.tasks.sandbox.cases import ProgramTests
from gspo_moe.types import Prompt
from tests.sandboxes import sandbox
from tests.turns import answered

TESTS = {"kind": "stdin", "inputs": ["1", "2"], "outputs": ["2", "4"]}
PROMPT = Prompt("train/0", "Double it.", "data", {"tests": TESTS})


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```python\nx = 1\n```\n```py\nx = 2\n```\n```\nout\n```", "x = 2\n"),
        ("```\nx = 1\n```\n```cpp\nint x;\n```", "int x;\n"),
        ("<think>\n```python\nwrong\n```\n</think>\n```Python3\nx = 1\n```", "x = 1\n"),
        ('````python\nx = """\n```\n"""\n````', 'x = """\n```\n"""\n'),
        ("  ```python title=a.py\n  x = 1\n  ```", "  x = 1\n"),
        ("```python\nx = 1", None),
        ("x = 1", None),
    ],
)
def test_the_last_python_block_is_the_program(answer: str, program: str | None) -> None:
    assert program_in(answer, whole=False) == program
    assert program_in("x = 1", whole=True) == "x = 1"


def test_rewards_and_parts() -> None:
    closed = sandbox("either").closed
    options: dict[str, Any] = {} if closed else {"allow_without_bubblewrap": True, "python": "/usr/bin/python3"}
    strict, share = Code(options), Code({**options, "score": "fraction", "wall_seconds": 4})
    clean = {"no_code": 0.0, "compile_error": 0.0, "timeout": 0.0, "over_limit": 0.0}

    def found(rubric: Code, program: str) -> dict[str, float]:
        return dict(rubric.reward(PROMPT, answered(f"```python\n{program}\n```")))

    assert found(strict, "print(int(input()) * 2)") == {"reward": 1.0, "tests_passed": 1.0, **clean}
    assert found(strict, "print(2)") == {"reward": 0.0, "tests_passed": 0.5, **clean}
    assert found(share, "print(2)") == {"reward": 0.5, "tests_passed": 0.5, **clean}
    assert found(strict, "print(") == {"reward": 0.0, "tests_passed": 0.0, **clean, "compile_error": 1.0}
    assert strict.reward(PROMPT, answered("print(2)"))["no_code"] == 1.0
    slow = Code({**options, "total_seconds": 0.4})
    assert found(slow, "import time\ntime.sleep(9)") == {"reward": 0.0, "tests_passed": 0.0, **clean, "timeout": 1.0}


def test_tests_stand_in_the_reference_or_its_row() -> None:
    expected = ProgramTests("stdin", ("1", "2"), ("2", "4"))
    assert given_tests(PROMPT) == given_tests(Prompt("train/1", "?", "data", {"row": {"tests": TESTS}})) == expected
    with pytest.raises(DataError, match="prompt train/2 has no tests, which the reward `code` runs"):
        given_tests(Prompt("train/2", "?", "data", {"answer": "4"}))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"name": "code", "options": {"total_seconds": 12}},
            r"task\.reward\.options\.total_seconds=12 is not below task\.reward\.timeout_seconds=10",
        ),
        (
            {"sum": [{"name": "code", "options": {"total_seconds": 12}}]},
            r"task\.reward\.sum\[0\]\.options\.total_seconds=12 is not below",
        ),
        ({"name": "code", "timeout_seconds": 5}, r"total_seconds=8 is not below task\.reward\.timeout_seconds=5"),
        ({"name": "code", "options": {"wall_seconds": 1}}, r"wall_seconds=1 is less than cpu_seconds=4"),
        (
            {"name": "code", "options": {"wall": 1}},
            r"unknown key task\.reward\.options\.wall=1; leave it out, or take one of cpu_seconds, ",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_run(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(TaskConfig.model_validate({"reward": reward}), seed=1)
