from __future__ import annotations

import json
import re
from typing import Any

import pytest
import reasoning_gym

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.reasoning_gym_task import REFUSED, SHORT_PROMPTS, TEMPLATES_BY_INDEX, ReasoningGym
from gspo_moe.types import Prompt
from tests.turns import answered

LONGEST_OF_OPTIONS: dict[str, dict[str, Any]] = {
    "number_sorting": {"max_decimals": 0, "max_numbers": 6},
    "countdown": {"max_numbers": 4},
    "chain_sum": {"max_terms": 4},
    "basic_arithmetic": {"max_terms": 4},
}


@pytest.mark.parametrize("dataset", SHORT_PROMPTS)
def test_short_prompts_hold_what_the_question_holds_in_few_characters(dataset: str) -> None:
    task = ReasoningGym(dataset, LONGEST_OF_OPTIONS[dataset], seed=1)
    for index in range(10):
        prompt = task.prompt("train", index)
        metadata = prompt.reference["metadata"]
        assert len(prompt.text) < 60
        assert prompt.text.endswith(" =")
        for key in ("direction", "target", "expression"):
            if key in metadata and dataset != "countdown":
                assert str(metadata[key]) in prompt.text
        for key in ("original_numbers", "numbers"):
            if isinstance(metadata.get(key), list):
                assert ", ".join(map(str, metadata[key])) in prompt.text


def test_a_short_prompt_does_not_give_the_answer_away() -> None:
    task = ReasoningGym("countdown", {}, seed=1)
    prompt = task.prompt("train", 0)
    numbers, target = prompt.reference["metadata"]["numbers"], prompt.reference["metadata"]["target"]
    assert prompt.text == f"{target} from {', '.join(map(str, numbers))} ="
    assert prompt.reference["answer"] not in prompt.text


def test_a_dataset_without_a_short_form_asks_its_own_question() -> None:
    task = ReasoningGym("leg_counting", {}, seed=1)
    prompt = task.prompt("train", 0)
    assert prompt.text == prompt.reference["question"]
    assert prompt.text.startswith("Your task is to count how many legs")


def test_rewards_are_reasoning_gyms_own_for_an_entry_that_went_through_json() -> None:
    task = ReasoningGym("countdown", {"max_numbers": 4}, seed=1)
    prompt = task.prompt("eval", 3)
    thawed = Prompt(prompt.uid, prompt.text, prompt.task, json.loads(json.dumps(prompt.reference)))
    scorer = reasoning_gym.create_dataset("countdown", seed=0)
    right, numbers = prompt.reference["answer"], prompt.reference["metadata"]["numbers"]
    for answer in (right, f"({right})", "+".join(map(str, numbers)), "1+", ""):
        assert task.reward(thawed, answered(answer)) == scorer.score_answer(answer, prompt.reference)
    assert task.reward(thawed, answered(f"({right})")) == 1.0
    assert task.reward(thawed, answered("1+")) == 0.01


def test_options_reach_the_dataset() -> None:
    task = ReasoningGym("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2}, seed=1)
    for index in range(5):
        metadata = task.prompt("train", index).reference["metadata"]
        assert (metadata["num_terms"], metadata["num_digits"]) == (3, 2)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("chain_sum", {"max_term": 3}, r"task\.options\.max_term=3; .* task\.options\.max_terms"),
        ("chain_sum", {"min_terms": 9}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, r"task\.options=\{'min_terms': 'two'\}"),
        ("chain_sum", {"min_terms": 2.5}, "cannot give entry"),
        ("chain_sum", {"seed": 3}, r"task\.options\.seed=3 .*remove it"),
        ("chain_sum", {"size": 10}, r"task\.options\.size=10 .*remove it"),
        ("composite", {}, "Must specify at least one dataset"),
        *(
            (dataset, {}, re.escape(f"reasoning_gym/{dataset} cannot be used: {why}; "))
            for dataset, why in REFUSED.items()
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(dataset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(dataset, options, seed=1)


def test_a_task_without_reference_answers_refuses_supervised_training() -> None:
    task = ReasoningGym("graph_color", {}, seed=1)
    with pytest.raises(ConfigError, match="no reference answers, so stage sft cannot use it"):
        task.demonstration(task.prompt("sft", 0))


@pytest.mark.parametrize("dataset", TEMPLATES_BY_INDEX)
def test_datasets_of_a_fixed_size_give_entries_without_end(dataset: str) -> None:
    one, other = (ReasoningGym(dataset, {}, seed=1) for _ in range(2))
    prompts = [one.prompt("train", index) for index in range(100)]
    assert len({prompt.text for prompt in prompts}) == 100
    assert prompts == [other.prompt("train", index) for index in range(100)]
    for prompt in prompts:
        assert one.reward(prompt, answered(str(prompt.reference["answer"]))) == 1.0
