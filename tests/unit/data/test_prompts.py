from __future__ import annotations

from gspo_moe.data.prompts import PromptSource
from gspo_moe.types import Prompt


class Counting:
    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(uid=f"{split}/{index}", text=str(index), task="counting")


def uids(prompts: list[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


def test_batches_follow_one_another_whatever_their_size() -> None:
    source = PromptSource(Counting(), "train")
    assert uids(source.take(2) + source.take(0) + source.take(3)) == [f"train/{index}" for index in range(5)]
    assert source.position == 5


def test_a_source_continues_from_a_saved_position() -> None:
    source = PromptSource(Counting(), "sft")
    source.take(7)
    continued = PromptSource(Counting(), "sft", position=source.position)
    assert uids(continued.take(4)) == uids(source.take(4)) == ["sft/7", "sft/8", "sft/9", "sft/10"]
