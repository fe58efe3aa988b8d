"""Conversations of several turns as one sequence each; engine and environment stand in."""

from collections.abc import Sequence
from dataclasses import replace

from gspo_moe.errors import DataError
from gspo_moe.rollout.conversation import Exchange, Talk, opened
from gspo_moe.rollout.engine import Request
from gspo_moe.tasks.rewards import Step
from gspo_moe.types import Conversation, Prompt, Reward, Rollout, Turn
from tests.rollouts import rollout

PROMPT = Prompt("train/0", "?", "guess")


def answer(request: Request) -> Rollout:
    """One token that counts what stands before it, and the end token."""
    found = rollout(request.uid, 0, request.prompt_ids, (len(request.prompt_ids), 59), version=len(request.prompt_ids))
    return replace(found, log_probs=(-0.5, -0.25), turns=(Turn("policy", f"guess {len(request.prompt_ids)}"),))


def exchange(said: dict[int, Step], room: int = 100, max_turns: int = 5) -> tuple[Exchange, list[list[str]]]:
    """said: the environment's answer behind that many turns. Second comes what was asked of the engine."""
    asked: list[list[str]] = []

    def generate(requests: list[Request]) -> list[Rollout]:
        asked.append([request.uid for request in requests])
        return [answer(request) for request in requests]

    def step(items: list[tuple[Prompt, Conversation]]) -> list[Step]:
        return [said.get(len(turns), Step(None)) for _, turns in items]

    def render(prompt: Prompt, one: Rollout, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def failed(error: str, timed_out: bool) -> Reward:
        return Reward(-1.0, error=error, timed_out=timed_out)

    return Exchange(generate, step, render, lambda count: count, room, max_turns, failed), asked


def carried_on(exchange: Exchange, *rollouts: Rollout) -> Sequence[Rollout]:
    talks = [Talk(PROMPT, one) for one in rollouts]
    exchange.carry_on(talks)
    return [talk.rollout for talk in talks]


def first(index: int = 0) -> Rollout:
    return replace(answer(Request("train/0", (1, 2, 3), 1)), sample_index=index)


def test_turns_lie_end_to_end_and_only_the_policys_tokens_are_its_own() -> None:
    over, asked = exchange({1: Step("no"), 3: Step("n")})
    (found,) = carried_on(over, first())
    assert found.token_ids == (1, 2, 3, 3, 59, ord("n"), ord("o"), 7, 59, ord("n"), 10, 59)
    assert found.policy_mask == (0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1)
    assert len(found.log_probs) == sum(found.policy_mask)
    assert found.versions == ((3, 2), (7, 2), (10, 2))
    assert [turn.text for turn in found.turns] == ["guess 3", "no", "guess 7", "n", "guess 10"]
    assert (found.finish, found.uid, found.prompt_ids) == ("stop", "train/0", (1, 2, 3))
    assert asked == [["train/0/0/1"], ["train/0/0/2"]]


def test_samples_of_a_prompt_go_on_with_seeds_of_their_own() -> None:
    over, asked = exchange({1: Step("no")})
    carried_on(over, first(0), first(1))
    assert asked == [["train/0/0/1", "train/0/1/1"]]


def test_a_conversation_ends_where_the_policys_turn_was_cut_off() -> None:
    over, asked = exchange({1: Step("no")})
    cut = replace(first(), finish="length")
    assert carried_on(over, cut) == [cut]
    assert asked == []


def test_no_room_or_no_turn_left_ends_it_by_length() -> None:
    for over, _ in (exchange({1: Step("no")}, room=6), exchange({1: Step("no"), 3: Step("no")}, max_turns=2)):
        (found,) = carried_on(over, first())
        assert found.finish == "length"
        assert found.turns[-1].role == "policy"
        assert len(found.log_probs) == sum(found.policy_mask)


def test_a_broken_environment_ends_its_conversation_alone() -> None:
    over, asked = exchange({1: Step(None, error="it broke", timed_out=True)})
    (found,) = carried_on(over, first())
    assert (found.finish, found.reward) == ("error", Reward(-1.0, error="it broke", timed_out=True))
    assert asked == []


def test_a_turn_that_cannot_be_rendered_ends_its_conversation_alone() -> None:
    def refuse(prompt: Prompt, one: Rollout, text: str) -> list[int]:
        raise DataError("no template")

    over = replace(exchange({1: Step("no")})[0], render=refuse)
    (found,) = carried_on(over, first())
    assert (found.finish, found.reward) == ("error", Reward(-1.0, error="no template"))


def test_what_is_said_at_the_reset_opens_the_conversation() -> None:
    over, _ = exchange({})
    assert opened(first(), Step(None), over.failed) == first()
    assert [turn.text for turn in opened(first(), Step("hello"), over.failed).turns] == ["hello", "guess 3"]
    broken = opened(first(), Step(None, error="no reset"), over.failed)
    assert (broken.finish, broken.reward) == ("error", Reward(-1.0, error="no reset"))
