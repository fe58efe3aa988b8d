"""Functions of the user's own, in the forms that verl and TRL document, against what each must be called with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.errors import ConfigError, DataError, RewardError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.pool import TaskPool
from gspo_moe.tasks.rubrics.own import own_rubric
from gspo_moe.types import Message, Prompt, Reward, Turn
from tests.turns import answered

OWN = """
import os

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 1, "saw": data_source + str(extra_info)}

def verl_required(solution_str, ground_truth, extra_info):
    return len(extra_info)

def trl(completions, solution, **kwargs):
    return [float(one == right) + (level or 0) for one, right, level in zip(completions, solution, kwargs["level"])]

def chat(prompts, completions):
    right = [one[-1]["content"] == "72" for one in completions]
    return [len(one) + 10 * len(other) + 100 * last for one, other, last in zip(prompts, completions, right)]

def everything(prompt, response, completion, answer, row, turns, options):
    return {"reward": len(prompt), "same": response == completion, "answer": int(answer), "row": row["level"],
            "turns": len(turns), "option": options["bonus"]}

def columns(**kwargs):
    return kwargs["level"] + kwargs["bonus"]

def named(response, bonus, level=7):
    return bonus + level

def absent(response, colour):
    return 0.0

def default(response, colour="blue"):
    return float(colour == "blue")

def of_group(completions, answers):
    if "raise" in completions:
        raise KeyError("acc")
    return [len(completions) if one != "none" else None for one in completions]

def too_few(completions):
    return [1.0]

def raises(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 1.0}["acc"]

async def later(response):
    return 1.0

def positional(response, /):
    return 1.0

number = 3

class Counted:
    def __init__(self, per_letter=1.0):
        self.per_letter = per_letter

    def __call__(self, response):
        return self.per_letter * len(response)

class Whole:
    def __init__(self, right):
        self.right = right

    def reward(self, prompt, turns):
        return self.right
"""
PROMPT = Prompt("train/3", "what?", "data", {"answer": "72", "source": "gsm8k", "row": {"level": 2}})
CHAT = Prompt("train/4", "", "data", {"answer": "72", "source": "s"}, messages=(Message("user", "what?"),))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("own") / "my_reward.py"
    file.write_text(OWN)
    return str(file)


def given(own: str, function: str, prompt: Prompt = PROMPT, answer: str = "72", **options: Any) -> Any:
    rubric: Any = own_rubric(f"{own}:{function}", options)
    if hasattr(rubric, "check"):
        rubric.check(prompt)
    return rubric.reward(prompt, answered(answer))


def test_verls_function_works_as_it_is(own: str) -> None:
    assert given(own, "verl") == {"score": 1.0, "acc": 1, "saw": "gsm8kNone"}
    row = {"answer": "72", "source": "gsm8k", "row": {"extra_info": {"index": 4}}}
    assert given(own, "verl", Prompt("train/0", "?", "data", row))["saw"] == "gsm8k{'index': 4}"
    assert [given(own, "verl_required", Prompt("train/0", "?", "data", row)), given(own, "verl_required")] == [1, 0]


def test_trls_function_works_as_it_is_with_columns_as_lists(own: str) -> None:
    rubric: Any = own_rubric(f"{own}:trl", {})
    other = Prompt("train/9", "?", "data", {"answer": "5", "source": "s", "row": {}})
    assert rubric.rewards([(PROMPT, answered("72")), (PROMPT, answered("7")), (other, answered("5"))]) == [
        3.0,
        2.0,
        1.0,
    ]
    solved = Prompt("train/9", "?", "data", {"answer": "5", "source": "s", "row": {"solution": "x", "level": 0}})
    assert rubric.rewards([(solved, answered("x"))]) == [1.0], "a column called solution is the column"


def test_in_trls_form_a_chat_is_messages(own: str) -> None:
    turns = (*answered("7"), Turn("environment", "no"), *answered("72"))
    rubric: Any = own_rubric(f"{own}:chat", {})
    assert rubric.rewards([(CHAT, turns), (CHAT, answered("7"))]) == [1 + 30 + 100, 1 + 10]


def test_a_function_gets_what_its_parameters_name(own: str) -> None:
    expected = {"reward": 5, "same": True, "answer": 72, "row": 2, "turns": 1, "option": 8}
    assert given(own, "everything", bonus=8) == expected
    assert given(own, "columns", bonus=1) == 3
    assert given(own, "named", bonus=1) == 3
    assert given(own, "named", CHAT, bonus=1) == 8
    assert given(own, "default") == 1.0


def test_a_class_is_made_with_the_options(own: str) -> None:
    assert given(own, "Counted", per_letter=2.0) == 4.0
    assert given(own, "Whole", right=3) == 3


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("absent", {}, r"wants colour, which nothing gives for train/3: there are prompt, .*, and the row has level;"),
        (
            "verl_required",
            {"bonus": 1},
            r"task\.reward\.options\.bonus=1 is no parameter of task\.reward=.*; the nearest",
        ),
        ("named", {}, "wants bonus, which nothing gives"),
        ("later", {}, "is an async function"),
        ("positional", {}, "takes response by position alone"),
        ("number", {}, "is of type int; name a function"),
        ("Whole", {}, r"failed \(TypeError: .*right"),
        ("nowhere", {}, "has no nowhere; it has "),
    ],
)
def test_what_cannot_be_called_is_refused_before_a_run(
    own: str, function: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        given(own, function, **options)


def test_a_prompt_without_an_answer_says_which_column_to_name(own: str) -> None:
    bare = Prompt("train/5", "?", "data", {"source": "s"})
    with pytest.raises(ConfigError, match=r"wants ground_truth, .* no row with columns; .*task\.data\.columns\.answer"):
        given(own, "verl", bare)
    rubric: Any = own_rubric(f"{own}:of_group", {})
    with pytest.raises(DataError, match="wants answers, which nothing gives for train/5"):
        rubric.rewards([(PROMPT, answered("1")), (bare, answered("1"))])


def test_a_list_of_the_wrong_length_is_refused(own: str) -> None:
    rubric: Any = own_rubric(f"{own}:too_few", {})
    assert rubric.rewards([(PROMPT, answered("1"))]) == [1.0]
    with pytest.raises(RewardError, match=r"gave 1 rewards for 2 answers \(list\); give a list with one for each"):
        rubric.rewards([(PROMPT, answered("1"))] * 2)


def test_the_functions_of_the_documentation_work(tmp_path: Path) -> None:
    text = (Path(__file__).parents[4] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (tmp_path / "shown.py").write_text(text.partition("```python")[2].partition("```")[0])
    shown = str(tmp_path / "shown.py")
    assert given(shown, "compute_score", answer="it is 72") == {"score": 1.0, "words": 3}
    assert given(shown, "accuracy", CHAT, answer="it is 72") == 1.0
    assert given(shown, "with_bonus", Prompt("train/0", "?", "t", {"answer": "A"}), answer="A", bonus=0.5) == 1.5


@pytest.fixture
def pools() -> Iterator[list[TaskPool]]:
    found: list[TaskPool] = []
    yield found
    for pool in found:
        pool.close()


def test_workers_give_whole_prompts_to_the_batch_form_and_spare_the_neighbours_of_what_fails(
    own: str, pools: list[TaskPool]
) -> None:
    config = TaskConfig(reward=RewardConfig(name=f"{own}:of_group", failure_reward=-1.0, timeout_seconds=60))
    pools.append(TaskPool(config, seed=1, batched=True))
    prompts = [Prompt(f"train/{number}", "?", "data", {"answer": "1", "source": "s"}) for number in range(3)]
    texts = [["a"] * 70, ["a", "none", "a", "a"], ["a", "raise"]]
    items = [(prompt, answered(text)) for prompt, some in zip(prompts, texts, strict=True) for text in some]
    rewards = pools[0].rewards(items)
    # Two small prompts share a call and one of them raises, so that their items came one by one.
    assert [reward.total for reward in rewards] == [70.0] * 70 + [1.0, -1.0, 1.0, 1.0] + [1.0, -1.0]
    assert [number for number, reward in enumerate(rewards) if reward.error] == [71, 75]
    assert "reward gave None, which is no number" in str(rewards[71].error)
    assert str(rewards[75].error).endswith("KeyError: 'acc'")
    task = make_task(TaskConfig(reward=RewardConfig(name=f"{own}:too_few")), seed=1)
    assert hasattr(task.rubric, "rewards")


def test_workers_give_verls_dict_by_part_and_an_error_with_the_users_own_lines(own: str, pools: list[TaskPool]) -> None:
    terms = [{"name": f"{own}:verl"}, {"name": f"{own}:too_few"}]
    config = TaskConfig.model_validate({"reward": terms})
    pools.append(TaskPool(config, seed=1, batched=True))
    items = [(PROMPT, answered("72")), (PROMPT, answered("7"))]
    rewards = pools[0].rewards(items)
    assert all(
        "RewardError: " in str(one.error) and "gave 1 rewards for 2 answers" in str(one.error) for one in rewards
    )
    assert pools[0].rewards(items[:1]) == [Reward(2.0, {"verl": 1.0, "verl/acc": 1.0, "too_few": 1.0})]
    pools.append(TaskPool(TaskConfig(reward=RewardConfig(name=f"{own}:raises")), seed=1))
    (reward,) = pools[1].rewards(items[:1])
    error = str(reward.error)
    assert error.startswith(f'train/3: Traceback (most recent call last):\n  File "{Path(own).resolve()}"')
    assert error.count('  File "') == 1
    assert '    return {"score": 1.0}["acc"]\n' in error
    assert error.endswith("\nKeyError: 'acc'")
