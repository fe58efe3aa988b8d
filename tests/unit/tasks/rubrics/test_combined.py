from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks.protocol import Item, last_answer
from gspo_moe.tasks.rewards import give_reward
from gspo_moe.tasks.rubrics.combined import ByPrompt, Term, WeightedSum
from gspo_moe.tasks.worker import one_outcome
from gspo_moe.types import Conversation, Prompt
from tests.turns import answered

PROMPT = Prompt("train/0", "?", "t")


class Fixed:
    """Gives what it is told, whatever the answer; refuses prompts without a text."""

    def __init__(self, value: Any) -> None:
        self.value, self.prepared = value, 0

    def check(self, prompt: Prompt) -> None:
        if not prompt.text:
            raise ConfigError("no text")

    def prepare(self) -> None:
        self.prepared += 1

    def reward(self, prompt: Prompt, turns: Conversation) -> Any:
        return self.value


class Batch:
    """Gives each answer its length, and keeps how many answers each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        return self.rewards([(prompt, turns)])[0]

    def rewards(self, items: Sequence[Item]) -> list[float]:
        self.calls.append(len(items))
        return [float(len(last_answer(turns))) for _, turns in items]


def test_a_sum_weighs_totals_and_logs_terms_without_weights() -> None:
    terms = [Term("math", Fixed({"score": 1.0, "acc": True}), 2.0), Term("format", Fixed(0.5), -0.5)]
    rubric = WeightedSum([*terms, Term("parts", Fixed({"a": 0.25, "b": 0.5}))])
    assert rubric.reward(PROMPT, answered("x")) == {
        "reward": 2.0 * 1.0 - 0.5 * 0.5 + 0.75,
        "math": 1.0,
        "math/acc": 1.0,
        "format": 0.5,
        "parts": 0.75,
        "parts/a": 0.25,
        "parts/b": 0.5,
    }
    assert not hasattr(rubric, "rewards")


def test_a_term_that_gives_no_number_is_named() -> None:
    with pytest.raises(DataError, match="format: reward gave None, which is no number"):
        WeightedSum([Term("format", Fixed(None))]).reward(PROMPT, answered("x"))
    for large in (1e308, 1e200, -1e300):
        task: Any = SimpleNamespace(rubric=WeightedSum([Term("size", Fixed(large))]))
        error = one_outcome(task, give_reward, (PROMPT, answered("x")), largest=1e6)
        assert error == f"DataError: size: reward gave {large!r}, which is no number from -1000000 to 1000000"


def test_a_sum_with_a_term_of_the_batch_form_is_one_itself() -> None:
    batch = Batch()
    rubric: Any = WeightedSum([Term("length", batch, 0.1), Term("one", Fixed(1.0))])
    given = rubric.rewards([(PROMPT, answered("abc")), (PROMPT, answered(""))])
    assert [one["reward"] for one in given] == [pytest.approx(1.3), 1.0]
    assert batch.calls == [2]
    assert rubric.reward(PROMPT, answered("abc"))["length"] == 3.0


def test_a_files_own_reward_takes_the_place_of_the_others() -> None:
    batch, usual, named = Batch(), Fixed(1.0), Prompt("train/1", "?", "t", {"reward": "length"})
    rubric: Any = ByPrompt(usual, {"length": batch})
    items = [(named, answered("abc")), (PROMPT, answered("abc")), (named, answered("ab"))]
    assert rubric.rewards(items) == [3.0, 1.0, 2.0]
    assert [rubric.reward(*item) for item in items] == [3.0, 1.0, 2.0]
    assert batch.calls == [2, 1, 1]
    assert not hasattr(ByPrompt(usual, {"other": usual}), "rewards")


def test_what_is_inside_is_checked_and_prepared() -> None:
    inner, usual = Fixed(1.0), Fixed(0.0)
    rubric = ByPrompt(usual, {"sum": WeightedSum([Term("one", inner)])})
    rubric.prepare()
    assert (inner.prepared, usual.prepared) == (1, 1)
    rubric.check(PROMPT)
    for reference in ({}, {"reward": "sum"}):
        with pytest.raises(ConfigError, match="no text"):
            rubric.check(Prompt("train/0", "", "t", reference))
