"""Conversations of several turns from the real engine, against one forward pass over the whole sequence.

Shape letters: T tokens of a sequence but the last, L MoE layers, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

import pytest
import torch

from gspo_moe.algorithms.loss import policy_loss
from gspo_moe.algorithms.ratios import Segments
from gspo_moe.errors import DataError
from gspo_moe.model.build import Model
from gspo_moe.model.weights import RandomSource
from gspo_moe.rollout import conversation
from gspo_moe.rollout.conversation import Exchange, Talk
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.engine import Request
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.routing.replay import check_routes
from gspo_moe.tasks.rewards import Step
from gspo_moe.types import Conversation, Prompt, Reward, Rollout, TrainingSample, Turn
from tests.policy import SIZES, packs_of, requests, sampling, score_and_record
from tests.qwen3 import built, layout

TURNS = 3
Joined = Callable[[Rollout, Rollout], Rollout]


def converse(model: Model) -> list[Rollout]:
    """Three turns of every prompt's samples, between which an environment says from two to four tokens."""
    engine = MegatronEngine(model, max_batch=8, prefill_tokens=64)
    engine.publish(model, 3)
    params = replace(sampling(), report_routes=True)

    def generate(asked: list[Request]) -> list[Rollout]:
        return [
            replace(one, turns=(Turn("policy", "said"),)) for group in engine.generate(asked, params) for one in group
        ]

    def step(items: list[tuple[Prompt, Conversation]]) -> list[Step]:
        return [Step("x" * (2 + len(turns) % 3)) if len(turns) < 2 * TURNS - 1 else Step(None) for _, turns in items]

    exchange = Exchange(
        generate=generate,
        step=step,
        render=lambda prompt, one, text: [30 + number for number in range(len(text))],
        most=lambda count: count,
        room=100,
        max_turns=TURNS,
        failed=lambda error, timed_out: Reward(0.0, error=error, timed_out=timed_out),
    )
    talks = [Talk(Prompt(one.uid, "?", "t"), one) for one in generate(requests(samples=3))]
    exchange.carry_on(talks)
    return [talk.rollout for talk in talks]


def sample_of(rollout: Rollout, advantage: float = 0.0) -> TrainingSample:
    return TrainingSample(
        rollout.token_ids, rollout.policy_mask, advantage, rollout_log_probs=rollout.log_probs, routes=rollout.routes
    )


def runs(rollout: Rollout) -> list[tuple[int, int, int]]:
    """Each turn's mask value and its bounds in the sequence."""
    found, start = [], 0
    for value, run in groupby(rollout.policy_mask):
        length = len(list(run))
        found.append((value, start, start + length))
        start += length
    return found


def differing(model: Model, rollouts: list[Rollout]) -> list[tuple[int, int]]:
    """Sequence and position of every token whose reported experts are not those of one forward pass over the whole."""
    samples = [sample_of(one) for one in rollouts]
    check_routes(enumerate(samples), SIZES)
    packs = packs_of(samples, per_pack=1)
    _, recordings = score_and_record(model, packs, RouteRecorder(model.chunks, SIZES, model.groups))
    found = []
    for number, (pack, recording) in enumerate(zip(packs, recordings, strict=True)):
        assert pack.routes_TAK is not None
        reported_TLK, own_TLK = (one.long().sort(dim=-1).values for one in (pack.routes_TAK, recording.routes_TLK))
        wrong = (reported_TLK != own_TLK).flatten(1).any(dim=1).nonzero().flatten()
        found += [(number, int(position)) for position in wrong]
    return found


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with built(SIZES, layout(), RandomSource(SIZES, seed=2)) as model:
        yield model


@pytest.fixture(scope="module")
def talked(model: Model) -> list[Rollout]:
    found = converse(model)
    assert sum(len(one.versions) == TURNS for one in found) >= 3
    return found


def test_every_turns_routes_are_those_of_one_forward_over_the_whole(model: Model, talked: list[Rollout]) -> None:
    assert differing(model, talked) == []


def second_turn(rollout: Rollout) -> tuple[int, int]:
    _, start, end = [run for run in runs(rollout) if run[0]][1]
    return start, end


def shifted(rollout: Rollout, by: int) -> Rollout:
    """The second policy turn's routes moved by some positions, round in their turn."""
    assert rollout.routes is not None
    start, end = second_turn(rollout)
    rows = rollout.routes.clone()
    rows[start:end] = rows[start:end].roll(by, dims=0)
    return replace(rollout, routes=rows)


@pytest.mark.parametrize("by", [1, -1])
def test_one_turn_that_is_shifted_shows_at_its_positions(model: Model, talked: list[Rollout], by: int) -> None:
    long = [one for one in talked if len(one.versions) == TURNS and one.versions[1][1] > 1]
    found = differing(model, [shifted(one, by) for one in long])
    assert {number for number, _ in found} == set(range(len(long)))
    for number, position in found:
        start, end = second_turn(long[number])
        assert start <= position < end


@pytest.mark.parametrize("turn", range(TURNS + TURNS - 1))
def test_one_turn_that_is_dropped_is_refused(talked: list[Rollout], turn: int) -> None:
    # The last token of a sequence is never fed, so that a last turn of one token has no routes.
    one = next(one for one in talked if len(one.versions) == TURNS and one.versions[-1][1] > 1)
    assert one.routes is not None
    _, start, end = runs(one)[1:][turn]
    dropped = replace(one, routes=torch.cat([one.routes[:start], one.routes[end:]]))
    with pytest.raises(DataError, match=r"sample 0: routes .* do not fit its \d+ tokens"):
        check_routes([(0, sample_of(dropped))], SIZES)


def _earlier_kept(joined: Joined, before: Rollout, more: Rollout) -> Rollout:
    """Peers' fault: the earlier turns' routes and the last answer's, without the environment's tokens between."""
    assert before.routes is not None
    assert more.routes is not None
    answer = more.routes[-len(more.log_probs) :]
    return replace(joined(before, more), routes=torch.cat([before.routes, answer]))


def _padded(joined: Joined, before: Rollout, more: Rollout) -> Rollout:
    """The same, filled up at its end to the length that is asked for."""
    short = _earlier_kept(joined, before, more).routes
    assert short is not None
    assert more.routes is not None
    return replace(joined(before, more), routes=torch.cat([short, more.routes])[: len(more.routes)])


@pytest.mark.parametrize("fault", [_earlier_kept, _padded])
def test_a_conversation_that_joins_its_turns_wrongly_is_found(
    model: Model, fault: Callable[[Joined, Rollout, Rollout], Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "joined", partial(fault, conversation.joined))
    rollouts = converse(model)
    if fault is _earlier_kept:
        with pytest.raises(DataError, match="do not fit"):
            differing(model, rollouts)
    else:
        assert len(differing(model, rollouts)) > len(rollouts)


def test_length_and_sequence_ratio_leave_the_environments_tokens_out(model: Model, talked: list[Rollout]) -> None:
    one = next(one for one in talked if len(one.versions) == TURNS)
    (pack,) = packs_of([sample_of(one, advantage=1.0)], per_pack=1)
    new_T = torch.randn(pack.num_tokens, generator=torch.Generator().manual_seed(3)) * 0.01
    old_T = torch.zeros(pack.num_tokens)
    segments = Segments.of_pack(pack.cu_seqlens, pack.response_mask_T)
    assert segments.lengths_N.tolist() == [len(one.log_probs)] == [sum(one.policy_mask)]
    found = policy_loss("gspo", new_T, old_T, pack.advantages_N, segments)
    # A token is scored where it is the target, one position before its own.
    own = [float(new_T[position - 1]) for position, sampled in enumerate(one.policy_mask) if sampled]
    expected = math.exp(sum(own) / len(own))
    assert float(found.metrics["ratio/sequence_max"]) == pytest.approx(expected, rel=1e-6)
    environment = torch.tensor(one.policy_mask[1:]) == 0
    assert int(environment.sum()) > len(one.prompt_ids)
    moved = policy_loss("gspo", new_T + environment * 3.0, old_T, pack.advantages_N, segments)
    assert float(moved.loss) == float(found.loss)
