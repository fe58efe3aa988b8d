"""How prompts are shared out, decoded and rewarded; engine and rewards stand in."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import RolloutError
from gspo_moe.rollout.answers import Answerer, all_rollouts
from gspo_moe.rollout.engine import Ended, Request, SamplingParams
from gspo_moe.rollout.stop_strings import StopStrings
from gspo_moe.tasks.pool import Item, TaskPool
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Conversation, Message, Prompt, Reward, Rollout
from tests.policy import sampling
from tests.qwen3 import layout
from tests.rollouts import rollout

STOP = 59
PROMPTS = [Prompt(f"train/{number}", "abcdefg"[: number + 1], "letters") for number in range(7)]


class Letters:
    """A token a letter."""

    eos_id = STOP
    vocab_size = 128
    chat_template = special = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Echo:
    """Answers each prompt with itself and, in samples of even number, the stop token."""

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, ended: Ended | None = None
    ) -> list[list[Rollout]]:
        return [[self._rollout(request, k) for k in range(request.samples)] for request in requests]

    def room(self, params: SamplingParams) -> int:
        return 100

    def _rollout(self, request: Request, k: int) -> Rollout:
        response = request.prompt_ids + (() if k % 2 else (STOP,))
        return rollout(request.uid, k, request.prompt_ids, response, finished=k % 2 == 0, version=4)


class EchoByBatches(Echo):
    """Tells of the answers to the first two prompts, and goes on once somebody has rewarded them."""

    def __init__(self, rewarded: Callable[[], bool]) -> None:
        self._rewarded = rewarded

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, ended: Ended | None = None
    ) -> list[list[Rollout]]:
        found = super().generate(requests, params)
        if ended is not None:
            for number in (1, 0):
                for one in found[number]:
                    ended(number, one)
            deadline = time.monotonic() + 120
            while not self._rewarded():
                assert time.monotonic() < deadline, "no reward while others are sampled"
                time.sleep(0.01)
        return found


class Marks:
    """Rewards an answer with its length, and leaves a file of its name in the folder that its prompt names."""

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        (Path(prompt.reference["folder"]) / turns[-1].text).touch()
        return float(len(turns[-1].text))


def make_marks(config: TaskConfig, seed: int) -> Task:
    prompts: Any = None
    return Task("marks", prompts=prompts, rubric=Marks())


class Lengths:
    """Rewards an answer with its length; an answer of three letters fails, one of four hangs."""

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        assert all([turn.text for turn in turns] == [prompt.text] for prompt, turns in items)
        answers = [prompt.text for prompt, _ in items]
        return [
            Reward(float(len(text)), error=f"{text} broke" if len(text) in (3, 4) else None, timed_out=len(text) == 4)
            for text in answers
        ]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_here(error: RolloutError | None) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("gspo_moe.rollout.answers.raise_everywhere", raise_here)


def answerer(rank: int = 0, ranks: int = 1) -> Answerer:
    """One of several data or context-parallel ranks, as far as sharing goes."""
    one: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    data: Any = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
    groups: Any = SimpleNamespace(layout=layout(), data_context=data, model=one, is_main=True)
    tokenizer: Any = Letters()
    rewards: Any = Lengths()
    return Answerer(Echo(), Renderer(tokenizer), rewards, groups)


def test_answers_are_decoded_without_the_stop_token() -> None:
    groups = answerer().generate(PROMPTS, 2, sampling(stop_ids=frozenset({STOP})))
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert [rollout.text for rollout in group.rollouts] == [group.prompt.text] * 2
        first, second = group.rollouts
        assert first.response_ids[-1] == STOP
        assert STOP not in second.response_ids
        assert {version for one in group.rollouts for version, _ in one.versions} == {4}


def test_each_of_several_stop_tokens_is_kept_out_of_the_text() -> None:
    letter = ord("c")  # which ends the answer to the third prompt and no other
    groups = answerer().generate(PROMPTS[:4], 2, sampling(stop_ids=frozenset({STOP, letter})))
    assert [[rollout.text for rollout in group.rollouts] for group in groups] == [
        ["a", "a"],
        ["ab", "ab"],
        ["abc", "ab"],
        ["abcd", "abcd"],
    ]


def test_a_token_that_only_looks_like_an_end_stays_in_the_text() -> None:
    (group,) = answerer().generate(PROMPTS[:1], 1, sampling(stop_ids=frozenset({7})))
    assert group.rollouts[0].text == "a;"


def test_a_stop_string_and_what_follows_it_are_kept_out_of_the_text_alone() -> None:
    tokenizer: Any = Letters()
    asked = replace(answerer(), stop_strings=StopStrings(("cd", "de"), tokenizer))
    groups = asked.generate(PROMPTS[:5], 1, sampling(stop_ids=frozenset({STOP})))
    assert [group.rollouts[0].text for group in groups] == ["a", "ab", "abc", "ab", "ab"]
    assert tokenizer.decode(groups[4].rollouts[0].response_ids) == "abcde;"
    assert groups[4].rollouts[0].turns[0].tokens == len(groups[4].rollouts[0].log_probs) == 6


def test_a_prompt_that_cannot_be_rendered_ends_every_rank() -> None:
    both = replace(PROMPTS[0], messages=(Message("user", "a"),))
    with pytest.raises(RolloutError, match="prompt train/0 has both text and messages"):
        answerer().generate([both], 1, sampling())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_share_the_prompts_in_order_and_nearly_evenly(ranks: int) -> None:
    shares = [
        [group.prompt for group in answerer(rank, ranks).generate(PROMPTS, 1, sampling())] for rank in range(ranks)
    ]
    assert [prompt for share in shares for prompt in share] == PROMPTS
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_rewards_come_in_the_order_of_the_rollouts_with_their_failures() -> None:
    share = answerer().generate(PROMPTS, 2, sampling(stop_ids=frozenset({STOP})))
    found = answerer().reward(share)
    assert [group.rewards for group in found] == [(float(n + 1),) * 2 for n in range(7)]
    rewards = [one.reward for one in all_rollouts(found) if one.reward is not None and one.reward.error is not None]
    assert [reward.error for reward in rewards] == ["abc broke", "abc broke", "abcd broke", "abcd broke"]
    assert [reward.timed_out for reward in rewards] == [False, False, True, True]
    assert [replace(one, reward=None) for one in all_rollouts(found)] == all_rollouts(share)


def test_rewards_begin_before_the_last_answer_has_ended(tmp_path: Path) -> None:
    prompts = [replace(prompt, reference={"folder": str(tmp_path)}) for prompt in PROMPTS]
    seen: list[set[str]] = []

    def rewarded() -> bool:
        seen.append({path.name for path in tmp_path.iterdir()})
        return seen[-1] >= {"a", "ab"}

    with TaskPool(TaskConfig(reward=RewardConfig(workers=1)), seed=1, make=make_marks) as pool:
        asked = replace(answerer(), engine=EchoByBatches(rewarded), pool=pool)
        share = asked.generate(prompts, 4, sampling(stop_ids=frozenset({STOP})), ahead=True)
        found = asked.reward(share)
    assert seen[-1] == {"a", "ab"}
    assert [group.rewards for group in found] == [(float(n + 1),) * 4 for n in range(7)]
