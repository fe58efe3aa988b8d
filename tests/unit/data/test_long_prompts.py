"""Which prompts are too long, and what comes in their place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gspo_moe.config.loading import load_config
from gspo_moe.data.long_prompts import KeptPrompts, Limit, ShortPrompts, lengths, prompt_limit, too_long
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import HFTokenizer, SentencePieceTokenizer
from gspo_moe.errors import ConfigError, RolloutError
from gspo_moe.types import Prompt

LIMIT = Limit(tokens=6, words="rollout.max_prompt_tokens=6")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(SentencePieceTokenizer.train(["abc 0123456789"], 300))


class Numbers:
    """Prompt n is n times the letter a, again and again up to nine of them."""

    def __init__(self, size: int | None = None) -> None:
        self._size = size

    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(f"{split}/{index}", "a" * (index % 9 + 1), "numbers")

    def size(self, split: str) -> int | None:
        return self._size


@pytest.mark.parametrize(
    ("changed", "positions", "limit"),
    [
        (["rollout.max_prompt_tokens=7"], 64, Limit(7, "rollout.max_prompt_tokens=7")),
        ([], 64, Limit(34, "the 34 tokens that rollout.max_response_tokens=30 leaves of the model's 64 positions")),
        (
            ["schedule.micro_batch_tokens=50"],
            64,
            Limit(20, "the 20 tokens that rollout.max_response_tokens=30 leaves of schedule.micro_batch_tokens=50"),
        ),
    ],
)
def test_the_limit_is_the_configs_or_what_an_answer_leaves(changed: list[str], positions: int, limit: Limit) -> None:
    assert prompt_limit(load_config(None, ["rollout.max_response_tokens=30", *changed]), positions) == limit


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (
            "rollout.max_prompt_tokens=35",
            r"max_prompt_tokens=35 and .*max_response_tokens=30 together exceed the model's 64",
        ),
        ("schedule.micro_batch_tokens=30", r"leaves no room for a prompt in schedule\.micro_batch_tokens=30"),
    ],
)
def test_limits_without_room_are_refused(changed: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        prompt_limit(load_config(None, ["rollout.max_response_tokens=30", changed]), 64)


def test_lengths_are_the_tokenizers_where_they_matter(renderer: Renderer) -> None:
    texts = ["a" * 5, "a" * 6, "a" * 700, "ä", "äää€", "日本"]
    prompts = [Prompt(f"train/{number}", text, "t") for number, text in enumerate(texts)]
    found = list(lengths(renderer, prompts, 6))
    exact = [len(renderer.prompt(prompt)) for prompt in prompts]
    assert (
        [length > 6 for length in found] == [length > 6 for length in exact] == [False, False, True, False, True, False]
    )
    assert all(got == right for got, right in zip(found, exact, strict=True) if right > 6)


def test_of_prompts_that_end_the_long_ones_are_numbered(renderer: Renderer) -> None:
    numbers = Numbers(size=20)
    found = too_long(numbers, "train", 20, lambda prompts: lengths(renderer, prompts, 6), 6)
    assert found == {6: 7, 7: 8, 8: 9, 15: 7, 16: 8, 17: 9}
    kept = KeptPrompts(numbers, "train", [0, 9])
    assert (kept.size("train"), kept.size("eval"), kept.prompt("train", 1).uid) == (2, 20, "train/9")


def test_in_place_of_a_generated_long_prompt_comes_another_one_for_good(renderer: Renderer) -> None:
    short = ShortPrompts(Numbers(), ["train"], renderer, LIMIT, drops=True)
    prompts = [short.prompt("train", index) for index in range(40)]
    assert all(len(prompt.text) <= 6 for prompt in prompts)
    assert [prompt.uid for prompt in prompts[:6]] == [f"train/{index}" for index in range(6)]
    assert len({prompt.uid for prompt in prompts}) == 40
    assert [short.prompt("train", index) for index in range(40)] == prompts
    assert len(short.prompt("eval", 8).text) == 9


def test_where_no_generated_prompt_is_short_or_none_may_be_left_out_the_run_ends(renderer: Renderer) -> None:
    none = ShortPrompts(Numbers(), ["train"], renderer, Limit(0, "LIMIT"), drops=True)
    with pytest.raises(RolloutError, match="100 prompts in a row of split 'train' are longer than LIMIT"):
        none.prompt("train", 3)
    strict = ShortPrompts(Numbers(), ["train"], renderer, LIMIT, drops=False)
    with pytest.raises(
        RolloutError, match=r"prompt train/8 has 9 tokens, more than rollout\.max_prompt_tokens=6; .*drop"
    ):
        strict.prompt("train", 8)


def test_a_prompt_is_cut_off_at_its_left_end(renderer: Renderer, tmp_path: Path) -> None:
    cut = Renderer(renderer.tokenizer, renderer.chat, max_prompt_tokens=4)
    assert cut.prompt(Prompt("train/0", "abc", "t"), "0123") == renderer.prompt(Prompt("train/0", "0123", "t"))
    assert cut.prompt(Prompt("train/0", "abc", "t")) == renderer.prompt(Prompt("train/0", "abc", "t"))


def test_prompts_that_quote_special_words_are_measured_right_beside_others(
    qwen_tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(qwen_tokenizer)
    words = ("é, say <|im_end|> " + "word " * 300, "é " * 600)
    prompts = [Prompt(f"train/{number}", words[number % 2], "numbers") for number in range(200)]
    counts = [len(renderer.prompt(prompt)) for prompt in prompts[:2]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert list(lengths(renderer, prompts, 10)) == counts * 100
    finally:
        sys.setswitchinterval(before)
