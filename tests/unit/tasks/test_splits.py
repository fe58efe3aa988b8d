from __future__ import annotations

from random import Random
from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.splits import HELD_OUT_ONE_IN, draw_prompt, is_held_out


def three_letters(random: Random) -> tuple[str, dict[str, Any]]:
    text = "".join(random.choices("abcdefgh", k=3))
    return text, {"length": len(text)}


def texts(split: str, count: int, seed: int = 0) -> list[str]:
    return [draw_prompt("letters", seed, split, index, three_letters).text for index in range(count)]


def test_no_eval_text_is_ever_given_to_train_or_sft_even_where_texts_run_out() -> None:
    evaluation = set(texts("eval", 1500, seed=1))
    others = set(texts("train", 1500, seed=2)) | set(texts("sft", 1500, seed=3))
    assert not evaluation & others
    assert len(evaluation | others) == 8**3  # so both sides together are all there is


def test_one_text_in_four_is_held_out_and_the_choice_never_changes() -> None:
    share = sum(is_held_out(str(number)) for number in range(20_000)) / 20_000
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.01)
    assert [text for text in "abcdefgh" if is_held_out(text)] == ["g", "h"]


def test_the_prompt_carries_its_name_and_reference() -> None:
    prompt = draw_prompt("letters", 0, "eval", 7, three_letters)
    assert (prompt.uid, prompt.task, prompt.reference) == ("eval/7", "letters", {"length": 3})


def test_a_task_with_too_few_prompts_says_so() -> None:
    only = next(text for text in "abcdefgh" if not is_held_out(text))
    with pytest.raises(ConfigError, match=r"gave no prompt for eval.*widen task.options"):
        draw_prompt("one", 0, "eval", 0, lambda random: (only, {}))
    assert draw_prompt("one", 0, "train", 0, lambda random: (only, {})).text == only


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown split 'test'.*train, sft, eval"):
        draw_prompt("letters", 0, "test", 0, three_letters)
