"""An answer in pieces of several policies against each policy's own words, log-probs and routes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_moe.rollout.servers.pieces import Pieces
from gspo_moe.rollout.servers.records import Ask
from tests.policy import sampling
from tests.simulated import STOP, answer, log_prob, route, token

ASK = Ask("train/3", 1, (7, 8), 9, sampling(seed="1/4"))


def test_an_answer_of_three_policies_keeps_what_each_one_sampled() -> None:
    pieces = Pieces(ASK)
    for sampled, finish, version in (
        (3, "abort", 4),
        (0, "abort", 8),
        (1, "abort", 12),
        (2, "abort", 12),
        (2, "stop", 16),
    ):
        pieces = pieces.and_then(answer(pieces.next_ask, sampled, finish, version))
    assert pieces.oldest == 4
    found, versions = pieces.rollout(), [4, 4, 4, 12, 12, 12, 16, 16]
    ids = [token("train/3", 1, place, version) for place, version in enumerate(versions)]
    ids[-1] = STOP
    assert found.versions == ((4, 3), (12, 3), (16, 2))
    assert (found.uid, found.sample_index, found.finish) == ("train/3", 1, "stop")
    assert found.token_ids == (7, 8, *ids)
    assert found.policy_mask == (0, 0, *(1,) * 8)
    expected = [log_prob(one, place, version) for place, (one, version) in enumerate(zip(ids, versions, strict=True))]
    assert list(found.log_probs) == expected
    assert found.routes is not None
    # Row t is of the pass from which token t + 1 was drawn: the prompt's first row is of the first policy.
    assert found.routes.tolist() == [route(t, version) for t, version in enumerate([4, *versions])]


def test_what_follows_goes_on_behind_all_tokens_with_the_rest_of_the_budget() -> None:
    pieces = Pieces(ASK)
    assert pieces.next_ask == ASK
    assert pieces.and_then(answer(ASK, 0, "abort", 0)).next_ask == ASK, "nothing was sampled"
    pieces = pieces.and_then(answer(ASK, 4, "abort", 0))
    more = pieces.next_ask
    assert more.token_ids == ASK.token_ids + pieces.token_ids
    assert (more.max_tokens, more.params) == (5, replace(ASK.params, seed="1/4/4"))
    pieces = pieces.and_then(answer(more, 2, "abort", 4))
    assert (pieces.next_ask.max_tokens, pieces.next_ask.params.seed) == (3, "1/4/6")
    assert pieces.finish is None


@pytest.mark.parametrize("last", ["abort", "length"])
def test_an_answer_ends_with_its_budget(last: str) -> None:
    pieces = Pieces(ASK).and_then(answer(ASK, 4, "abort", 0))
    pieces = pieces.and_then(answer(pieces.next_ask, 5, last, 4))
    assert pieces.rollout().finish == "length"


def test_routes_that_a_piece_lacks_are_lacking() -> None:
    pieces = Pieces(ASK).and_then(answer(ASK, 4, "abort", 0))
    pieces = pieces.and_then(replace(answer(pieces.next_ask, 1, "stop", 4), routes=None))
    assert pieces.rollout().routes is None
