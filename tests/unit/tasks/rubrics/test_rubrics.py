"""Rewards by name: which rubric a config makes, what is refused, and that a worker starts fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config.task import TaskConfig
from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.rewards import check_rewards
from gspo_moe.tasks.rubrics import REGISTRY, make_rubric, task_rubric
from gspo_moe.tasks.rubrics.combined import WeightedSum
from gspo_moe.types import Prompt
from tests.turns import answered

LETTERS = Prompt("train/0", "cab>", "sort_letters", {"answer": "abc"})


def task(reward: Any) -> TaskConfig:
    return validated(TaskConfig, {"reward": reward})


def given(reward: Any, answer: str) -> Any:
    return make_task(task(reward), seed=1).rubric.reward(LETTERS, answered(answer))


def test_a_name_a_list_and_a_section_are_rewards() -> None:
    assert given("exact", "abc") == given({"name": "exact"}, "abc") == given("task", "abc") == 1.0
    assert given({"name": "exact", "options": {"case": False}}, "ABC") == 1.0
    terms = ["task", {"name": "format", "weight": 0.5, "options": {"pattern": "[a-z]+"}}, {"name": "format"}]
    assert given(terms, "abd") == {"reward": 0.5, "task": 0.0, "format": 1.0, "format_2": 0.0}
    assert given({"sum": terms}, "abc")["reward"] == 1.5
    assert given({}, "abc") == 1.0


def test_terms_are_called_as_their_functions_but_never_as_the_total(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(response):\n    return 1\n\ndef short(response):\n    return 2\n")
    terms = [f"{tmp_path}/mine.py:{name}" for name in ("reward", "short", "short")]
    assert given(terms, "x") == {"reward": 5.0, "mine.reward": 1.0, "short": 2.0, "short_2": 2.0}


def test_a_files_own_reward_rewards_its_prompts() -> None:
    files = [{"path": "a.jsonl"}, {"path": "b.jsonl", "reward": "exact"}]
    config = validated(
        TaskConfig, {"data": {"train": files}, "reward": {"name": "format", "options": {"pattern": "a"}}}
    )
    rubric = task_rubric(config, make_rubric(task("exact").reward, None))
    with pytest.raises(ConfigError, match=r"task\.data\.eval\[0\]\.reward=exat is unknown; the nearest is exact"):
        task_rubric(validated(TaskConfig, {"data": {"eval": [{"path": "a.jsonl", "reward": "exat"}]}}), rubric)
    named = Prompt("train/1", "?", "data", {"answer": "b", "reward": "exact"})
    assert [rubric.reward(prompt, answered("b")) for prompt in (LETTERS, named)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "maths",
            r"task\.reward=maths is unknown; the nearest is math; known are math, code, exact, .*, task, and path",
        ),
        (["exact", "lenght"], r"task\.reward\.sum\[1\]=lenght is unknown; the nearest is length"),
        ("my_reward.py", r"names a file and no function; write my_reward\.py:function"),
        ({"name": "exact", "options": {"cases": 1}}, r"unknown key task\.reward\.options\.cases=1; .*options\.case"),
        (
            [{"name": "exact", "options": {"case": 3}}],
            r"task\.reward\.sum\[0\]\.options\.case=3: expected a valid bool",
        ),
        (
            {"name": "exact", "options": {"extract": "("}},
            r"task\.reward\.options: extract='\(' is no regular expression",
        ),
        ({"name": "task", "options": {"case": True}}, r"task\.reward\.options=.* are for none; leave them out"),
        ({"name": "length"}, "needs one of target and max_tokens"),
        ({"name": "exact", "sum": ["exact"]}, "are both given; make the name a term of the sum"),
        ([3], r"task\.reward|reward\.sum"),
    ],
)
def test_what_is_no_reward_is_refused(reward: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(task(reward), seed=1)


def test_task_means_the_tasks_own_and_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"task\.reward=task has none"):
        make_rubric(task("task").reward, None)


def test_the_prompts_of_a_split_are_checked() -> None:
    class Three:
        def prompt(self, split: str, index: int) -> Prompt:
            return Prompt(f"{split}/{index}", "?", "data", {} if index == 2 else {"answer": "1"})

        def size(self, split: str) -> int | None:
            return 3 if split == "train" else None

    rubric = WeightedSum([])
    check_rewards(rubric, Three(), "train")
    exact = make_rubric(task("exact").reward, None)
    check_rewards(exact, Three(), "eval")
    with pytest.raises(ConfigError, match="train/2 has no answer to compare with"):
        check_rewards(exact, Three(), "train")


def test_a_reward_imports_no_more_than_it_needs() -> None:
    script = (
        "import sys\nfrom gspo_moe.config.task import TaskConfig\nfrom gspo_moe.tasks import make_task\n"
        "make_task(TaskConfig.model_validate({'reward': ['exact', 'format', 'math']}), 1)\n"
        "print([name for name in ('torch', 'numpy', 'sympy', 'math_verify') if name in sys.modules])"
    )
    root = str(Path(__file__).parents[4])
    found = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_every_name_of_the_registry_is_in_its_documentation() -> None:
    table = (Path(__file__).parents[4] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in [*REGISTRY, "task"] if f"| `{name}` |" not in table] == []
