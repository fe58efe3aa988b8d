from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gspo_moe.data.prompts import PromptPosition, PromptSource
from gspo_moe.errors import ConfigError
from gspo_moe.types import Message, Prompt


class Counting:
    def __init__(self, size: int | None = None) -> None:
        self._size = size

    def prompt(self, split: str, index: int) -> Prompt:
        assert self._size is None or index < self._size
        return Prompt(uid=f"{split}/{index}", text=str(index), task="counting")

    def size(self, split: str) -> int | None:
        return self._size


class Alike(Counting):
    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(uid="one", text=str(index), task="counting")


def uids(prompts: list[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


def test_batches_follow_one_another_whatever_their_size() -> None:
    source = PromptSource(Counting(), "train")
    taken = source.take(2) + source.take(0) + source.take(3)
    assert uids(taken) == [f"train/{index}" for index in range(5)]
    source.done(taken)
    assert source.position == PromptPosition(5)


def test_a_source_continues_from_a_saved_position() -> None:
    source = PromptSource(Counting(), "sft")
    source.done(source.take(7))
    continued = PromptSource(Counting(), "sft", source.position)
    assert uids(continued.take(4)) == uids(source.take(4)) == ["sft/7", "sft/8", "sft/9", "sft/10"]


def test_what_is_not_done_comes_again_first_whatever_the_order_of_the_answers() -> None:
    source = PromptSource(Counting(), "train")
    first, second = source.take(4), source.take(3)
    source.done([second[1], first[3], first[0]])
    assert source.position == PromptPosition(7, (1, 2, 4, 6))
    resumed = PromptSource(Counting(), "train", source.position)
    again = resumed.take(3)
    assert uids(again) == ["train/1", "train/2", "train/4"]
    resumed.done(again[:2])
    assert resumed.position == PromptPosition(7, (4, 6))  # one under way, one still to come
    assert uids(resumed.take(3)) == ["train/6", "train/7", "train/8"]
    assert resumed.position == PromptPosition(9, (4, 6, 7, 8))


def test_a_position_goes_through_json() -> None:
    values = json.loads(json.dumps(asdict(PromptPosition(7, (1, 4)))))
    resumed = PromptSource(Counting(), "train", PromptPosition(**values))
    assert resumed.position == PromptPosition(7, (1, 4))
    assert uids(resumed.take(3)) == ["train/1", "train/4", "train/7"]


def test_finite_prompts_begin_again_under_other_names() -> None:
    source = PromptSource(Counting(size=3), "train")
    taken = source.take(7)
    assert [prompt.text for prompt in taken] == ["0", "1", "2", "0", "1", "2", "0"]
    assert uids(taken[2:]) == ["train/2", "train/0/epoch2", "train/1/epoch2", "train/2/epoch2", "train/0/epoch3"]
    source.done(taken[:5])
    assert source.position == PromptPosition(7, (5, 6))
    assert uids(PromptSource(Counting(size=3), "train", source.position).take(3)) == [
        "train/2/epoch2",
        "train/0/epoch3",
        "train/1/epoch3",
    ]


def test_no_prompts_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no prompts in its split 'sft'.*at least one"):
        PromptSource(Counting(size=0), "sft")
    with pytest.raises(ConfigError, match="two prompts of its split 'train' the uid 'one'"):
        PromptSource(Alike(), "train").take(2)


def test_a_prompt_goes_through_json_also_as_one_without_messages_was_written() -> None:
    chat = Prompt("train/0", "", "chat", {"answer": [1]}, (Message("system", "Be brief."), Message("user", "Hello")))
    assert Prompt.from_json(json.loads(json.dumps(asdict(chat)))) == chat
    old = {"uid": "train/0", "text": "a>", "task": "sort_letters", "reference": {}}
    assert Prompt.from_json(old) == Prompt("train/0", "a>", "sort_letters")
    assert (chat.shown, Prompt.from_json(old).shown) == ("system: Be brief.\nuser: Hello", "a>")
