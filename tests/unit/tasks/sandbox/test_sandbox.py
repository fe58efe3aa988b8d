"""Programs judged by their tests."""

from __future__ import annotations

from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.sandbox import ProgramTests, Sandbox, SandboxOptions
from gspo_moe.tasks.sandbox import sandbox as module
from tests.sandboxes import WAYS, sandbox

DOUBLE = "print(int(input()) * 2)"
CLASS = """
class Solution:
    def helper(self): return 1
    def two(self, numbers: List[int], k: int) -> List[int]:
        print("noise")
        return sorted(numbers)[:k], Counter(numbers)["x"], math.inf > 1
"""
STACK = """
import collections
Point = collections.namedtuple("Point", "x y")
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, one, times=1): self.items += [one] * times; return self
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __eq__(self, other): return self.items == other.items
    def __str__(self): return f"<{self.items}>"
def sum(a, b): return a + b
def count(n): yield from range(n)
def fail(n): raise ValueError("no")
def total(n): return {"a": (1, 2.5), 3: {4, 5}, "p": Point(1, None), "big": 2 ** 70}
"""


@pytest.fixture(scope="module", params=WAYS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    return sandbox(request.param)


def verdict(box: Sandbox, program: str, tests: ProgramTests, **more: Any) -> tuple[int, int, str | None]:
    found = box.judge(program, tests, seconds=30, **more)
    return found.passed, found.run, found.failure


def test_standard_streams_are_compared(box: Sandbox) -> None:
    tests = ProgramTests("stdin", ("1", "2\n", "3"), ("2\n", " 4 \n\n", "7"))
    assert verdict(box, DOUBLE, tests) == (2, 3, "wrong")
    assert verdict(box, DOUBLE, ProgramTests("stdin", ("x", "1"), ("", "2"))) == (0, 1, "failed")
    assert verdict(box, DOUBLE, ProgramTests("stdin", ("x", "1"), ("", "2")), stop_at_failure=False) == (1, 2, "failed")
    assert verdict(box, "print(", tests, stop_at_failure=False) == (0, 1, "compile")
    slow = "import time\nif input() == '2': time.sleep(60)\nprint(2)"
    assert verdict(box, slow, ProgramTests("stdin", ("1", "2"), ("2", "2"), time_limit_seconds=0.8)) == (1, 2, "wall")
    left = box.judge("import time\ntime.sleep(60)", tests, seconds=0.2, stop_at_failure=False)
    assert (left.passed, left.run, left.failure) == (0, 2, "wall")


def test_calls_give_their_results_as_json(box: Sandbox) -> None:
    tests = ProgramTests("function", ("[3,1,2]\n2",), ("[[1,2],0,true]",), function="two")
    assert verdict(box, CLASS, tests) == (1, 1, None)
    assert verdict(box, CLASS, ProgramTests("function", tests.inputs, ("[[1,2],0,1]",), function="two")) == (
        0,
        1,
        "wrong",
    )
    assert verdict(box, "def f(x): return x / 3", ProgramTests("function", ("1",), ("0.3333",)), tolerance=1e-3) == (
        1,
        1,
        None,
    )
    line = ('"a\u2028b"',)  # of one value: only \n ends it
    assert verdict(box, "def f(x): return x", ProgramTests("function", line, line)) == (1, 1, None)
    assert verdict(box, "def f(x): return f", ProgramTests("function", ("1",), ("1",))) == (0, 1, "failed")
    missing = box.judge("def f(x): return x", ProgramTests("function", ("1",), ("1",), function="g"), seconds=9)
    assert missing.reason == "test 1 of 1: KeyError: 'g'"


@pytest.mark.parametrize(
    "code",
    [
        "s = Stack(1)\ns.push(5, times=2).push(6)\nassert len(s) == 4 and s.items == [1, 5, 5, 6] and s",
        "assert Stack(1) == Stack(1)\nassert Stack(1) != Stack(2)\nassert str(Stack()) == '<[]>'",
        "assert list(count(3)) == [0, 1, 2]\nassert {*count(2)} == {0, 1}",
        "assert total(1) == {'a': (1, 2.5), 3: {4, 5}, 'p': (1, None), 'big': 2 ** 70}",
        "try:\n    fail(1)\nexcept ValueError as error:\n    assert 'no' in str(error)\nelse:\n    assert False",
        "def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(candidate)\ncheck(sum)",
        "import math\nassert math.isclose(sum(0.1, 0.2), 0.3)",
        "assert (Stack(1) + Stack(2)).items == [1, 2]\nassert 1 in Stack(1) and 2 not in Stack(1)",
    ],
)
def test_assertions_see_the_programs_functions_and_objects(code: str) -> None:
    found = sandbox("either").judge(STACK, ProgramTests("assert", code=(code,), function="sum"), seconds=30)
    assert (found.passed, found.reason) == (1, "")


def test_assertions_that_fail_say_so(box: Sandbox) -> None:
    tests = ProgramTests("assert", code=("assert f(1) == 2", "assert f(1) == 3, 'not three'", "assert g(1)"))
    found = box.judge("def f(x): return x + 1", tests, seconds=30, stop_at_failure=False)
    assert (found.passed, found.run, found.reason) == (1, 3, "test 2 of 3: AssertionError: not three")
    assert verdict(box, "def f(:", ProgramTests("assert", code=("assert f(1)",))) == (0, 1, "compile")
    assert verdict(
        box, "def f(x):\n    while 1: pass", ProgramTests("assert", code=("f(1)",), time_limit_seconds=0.4)
    ) in (
        (0, 1, "wall"),
        (0, 1, "failed"),  # by the limit of processor time, of which the tests see only the end
    )


def test_without_bubblewrap_the_config_must_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module._refusal.cache_clear()
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"task\.reward\.options runs programs, and bubblewrap \(bwrap\) is not installed; install .* or set "
        r"task\.reward\.options\.allow_without_bubblewrap=true",
    ):
        Sandbox(SandboxOptions(), "task.reward.options")
    module._refusal.cache_clear()


def test_a_python_that_does_not_run_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task\.reward\.options\.python=/no/python does not run as a Python"):
        Sandbox(SandboxOptions(python="/no/python"), "task.reward.options")
