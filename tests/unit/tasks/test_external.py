"""A task from outside the package: the example, and what can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.pool import TaskPool
from gspo_moe.tasks.rewards import Reward, Step
from gspo_moe.types import Turn
from tests.turns import answered

EXAMPLES = Path(__file__).parents[3] / "examples"
GAME = TaskConfig(name="guess_number:guess_number", options={"tries": 2}, reward=RewardConfig(timeout_seconds=60))


def test_the_examples_game_is_played_in_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    task = make_task(GAME, seed=1)
    assert not task.single_turn
    prompt = task.prompts.prompt("eval", 4)
    low, high, right = (answered(guess) for guess in "395")
    two = (*low, Turn("environment", "higher?"), *high)
    with TaskPool(GAME, seed=1) as pool:
        assert pool.steps([(prompt, turns) for turns in ((), low, high, right, two)]) == [
            Step(None),
            Step("higher?"),
            Step("lower?"),
            Step(None),
            Step(None),
        ]
        rewards = pool.rewards([(prompt, right), (prompt, two), (prompt, answered("?"))])
    assert rewards == [
        Reward(1.1, {"right": 1.0, "form": 0.1}),
        Reward(0.1, {"right": 0.0, "form": 0.1}),
        Reward(0.0, {"right": 0.0, "form": 0.0}),
    ]
    with pytest.raises(ConfigError, match="guess_number has no demonstrations"):
        task.demonstration(prompt)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:task", r"importing no_such_module failed \(ModuleNotFoundError: .*; mend it, or put"),
        (":task", r"task\.name=:task is not of the form my_module:name"),
        ("own_task:absent", r"own_task\.py has no absent; it has nothing, broken"),
        ("own_task.py:absent", r"own_task\.py has no absent; it has nothing, broken"),
        ("own_task:nothing", r"own_task:nothing gave a dict; let it return"),
        ("own_task:broken", r"own_task:broken with task\.options=\{\} failed \(TypeError: .*; correct the options"),
    ],
)
def test_what_is_no_task_is_refused(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makers = "def nothing(options, seed):\n    return {}\n\ndef broken():\n    return {}\n"
    (tmp_path / "own_task.py").write_text(makers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        make_task(TaskConfig(name=name), seed=1)
