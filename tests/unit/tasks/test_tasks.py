"""What holds for every task, and how tasks are named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.tasks import make_task
from tests.turns import answered

TASKS = (
    TaskConfig(name="sort_letters"),
    TaskConfig(name="reasoning_gym/number_sorting"),
    TaskConfig(name="reasoning_gym/countdown", options={"max_numbers": 4, "operators": ["+", "-"]}),
    TaskConfig(name="reasoning_gym/chain_sum"),
    TaskConfig(name="reasoning_gym/basic_arithmetic"),
    TaskConfig(name="reasoning_gym/leg_counting"),
)
by_name = pytest.mark.parametrize("config", TASKS, ids=[config.name for config in TASKS])


@by_name
def test_the_same_seed_split_and_index_give_the_same_prompt_in_any_order(config: TaskConfig) -> None:
    one, other = (make_task(config, seed=5).prompts for _ in range(2))
    forward = [one.prompt(split, index) for split in ("train", "eval") for index in range(4)]
    backward = [other.prompt(split, index) for split in ("eval", "train") for index in (3, 2, 1, 0)]
    assert forward == backward[::-1]
    assert [prompt.uid for prompt in forward[:2]] == ["train/0", "train/1"]
    assert {prompt.task for prompt in forward} == {config.name}


@by_name
def test_seeds_splits_and_indices_give_different_prompts(config: TaskConfig) -> None:
    first, second = (make_task(config, seed).prompts for seed in (1, 2))
    texts = [first.prompt(split, index).text for split in ("train", "sft") for index in range(3)]
    texts += [second.prompt("train", index).text for index in range(3)]
    assert len(set(texts)) == len(texts)


@by_name
def test_the_demonstrations_reward_is_one_and_a_wrong_answer_less(config: TaskConfig) -> None:
    task = make_task(config, seed=3)
    for index in range(5):
        prompt = task.prompts.prompt("sft", index)
        assert task.rubric.reward(prompt, answered(task.demonstration(prompt))) == 1.0
        wrong = task.rubric.reward(prompt, answered("no such answer"))
        assert isinstance(wrong, float)
        assert wrong < 0.5


def test_an_unknown_task_names_the_nearest_and_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"task\.name=sort_leters .*nearest is sort_letters; known are sort_letters, skip_counting, r"
    ):
        make_task(TaskConfig(name="sort_leters"), seed=1)
    with pytest.raises(ConfigError, match="nearest is reasoning_gym/countdown"):
        make_task(TaskConfig(name="reasoning_gym/countdwon"), seed=1)
    with pytest.raises(ConfigError, match="nearest is reasoning_gym/chain_sum"):
        make_task(TaskConfig(name="chain_sum"), seed=1)


def test_tasks_import_neither_torch_nor_reasoning_gym() -> None:
    code = (
        "import sys, gspo_moe.tasks.pool\n"
        "from gspo_moe.tasks import make_task, TaskConfig\n"
        "make_task(TaskConfig(), 1).prompts.prompt('train', 0)\n"
        "print([name for name in ('torch', 'reasoning_gym', 'sympy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
