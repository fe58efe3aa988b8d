"""How prompts are shared out, decoded and rewarded; engine and rewards stand in."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.errors import RewardError
from gspo_moe.rollout.answers import Answerer, Answers, ScoredGroup
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.tasks.pool import Item
from gspo_moe.tasks.rewards import Reward
from gspo_moe.types import Prompt, Rollout, RolloutGroup
from tests.policy import sampling
from tests.qwen3 import layout
from tests.turns import answered

STOP = 59
PROMPTS = [Prompt(f"train/{number}", "abcdefg"[: number + 1], "letters") for number in range(7)]


class Letters:
    """A token a letter."""

    eos_id = STOP

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Echo:
    """Answers each prompt with itself and, in samples of even number, the stop token."""

    def generate(self, requests: Sequence[Request], params: SamplingParams, policy_version: int) -> list[list[Rollout]]:
        return [[self._rollout(request, k, policy_version) for k in range(request.samples)] for request in requests]

    def _rollout(self, request: Request, k: int, policy_version: int) -> Rollout:
        response = request.prompt_ids + (() if k % 2 else (STOP,))
        return Rollout(
            request.uid, k, request.prompt_ids, response, (-0.5,) * len(response), k % 2 == 0, policy_version
        )


class Lengths:
    """Rewards an answer with its length; an answer of three letters fails, one of four hangs."""

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        assert all(turns == answered(prompt.text) for prompt, turns in items)
        answers = [prompt.text for prompt, _ in items]
        return [
            Reward(float(len(text)), error=f"{text} broke" if len(text) in (3, 4) else None, timed_out=len(text) == 4)
            for text in answers
        ]


def test_rewards_that_all_failed_are_an_error_unless_allowed() -> None:
    group = ScoredGroup(RolloutGroup(PROMPTS[0], ()), (0.0, 0.0))
    some, all_failed = Answers((group,), 1, 0, "a broke"), Answers((group,), 1, 1, "a broke")
    assert some.check(allow_all_failed=False) is some
    assert all_failed.check(allow_all_failed=True) is all_failed
    with pytest.raises(RewardError, match=r"none of 2 answers .*: a broke\nMend .* task.reward.allow_all_failed=true"):
        all_failed.check(allow_all_failed=False)


def answerer(rank: int = 0, ranks: int = 1) -> Answerer:
    """One of several data or context-parallel ranks, as far as sharing goes."""
    one: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    data: Any = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
    groups: Any = SimpleNamespace(layout=layout(), data_context=data, model=one, is_main=True)
    tokenizer: Any = Letters()
    rewards: Any = Lengths()
    return Answerer(Echo(), tokenizer, rewards, groups)


def test_answers_are_decoded_without_the_stop_token() -> None:
    groups = answerer().generate(PROMPTS, 2, sampling(stop_ids=frozenset({STOP})), policy_version=4)
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert [rollout.text for rollout in group.rollouts] == [group.prompt.text] * 2
        first, second = group.rollouts
        assert first.response_ids[-1] == STOP
        assert STOP not in second.response_ids
        assert {rollout.policy_version for rollout in group.rollouts} == {4}


def test_each_of_several_stop_tokens_is_kept_out_of_the_text() -> None:
    letter = ord("c")  # which ends the answer to the third prompt and no other
    groups = answerer().generate(PROMPTS[:4], 2, sampling(stop_ids=frozenset({STOP, letter})), policy_version=4)
    assert [[rollout.text for rollout in group.rollouts] for group in groups] == [
        ["a", "a"],
        ["ab", "ab"],
        ["abc", "ab"],
        ["abcd", "abcd"],
    ]


def test_a_token_that_only_looks_like_an_end_stays_in_the_text() -> None:
    (group,) = answerer().generate(PROMPTS[:1], 1, sampling(stop_ids=frozenset({7})), policy_version=0)
    assert group.rollouts[0].text == "a;"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_share_the_prompts_in_order_and_nearly_evenly(ranks: int) -> None:
    shares = [
        [group.prompt for group in answerer(rank, ranks).generate(PROMPTS, 1, sampling(), 0)] for rank in range(ranks)
    ]
    assert [prompt for share in shares for prompt in share] == PROMPTS
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_rewards_come_in_the_order_of_the_rollouts_with_their_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gspo_moe.rollout.answers.gather_objects", lambda value, group: [value])
    share = answerer().generate(PROMPTS, 2, sampling(stop_ids=frozenset({STOP})), 0)
    answers = answerer().rewards(share)
    assert [scored.group for scored in answers.groups] == share
    assert [scored.rewards for scored in answers.groups] == [(float(n + 1),) * 2 for n in range(7)]
    assert (answers.failures, answers.timeouts, answers.first_error) == (2, 2, "abc broke")


def test_every_ranks_groups_are_gathered_in_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = []
    for rank in range(2):
        monkeypatch.setattr("gspo_moe.rollout.answers.gather_objects", lambda value, group: [value])
        one = answerer(rank, 2)
        found = one.rewards(one.generate(PROMPTS, 1, sampling(stop_ids=frozenset({STOP})), 0))
        parts.append((list(found.groups), found.failures, found.timeouts, found.first_error))
    monkeypatch.setattr("gspo_moe.rollout.answers.gather_objects", lambda value, group: parts)
    answers = answerer().rewards([])
    assert [scored.group.prompt for scored in answers.groups] == PROMPTS
    assert (answers.failures, answers.timeouts, answers.first_error) == (1, 1, "abc broke")
