"""The probe behind each sync lets weights pass that are the trainer's, and stops the run for any others."""

import math
from typing import Any

import pytest

from gspo_moe.errors import RolloutError
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.rollout.servers.probe import PROMPT_TOKENS, SAMPLED_TOKENS, TOLERANCES, Probe, probe_ids
from gspo_moe.rollout.servers.records import Answer, Ask, Post
from tests.qwen3 import layout
from tests.servers import PlainDialect, Servers

TOKENS = tuple(range(40, 40 + SAMPLED_TOKENS))


@pytest.fixture(autouse=True)
def _groups() -> Any:
    initialize(layout(), seed=1)
    yield
    shut_down()


def scored(model: Any, token_ids: tuple[int, ...]) -> list[float]:
    """A trainer in which token i has the log-prob -i / 10."""
    return [-token / 10 for token in token_ids[1:]]


def probe(off_by: dict[int, float], tolerance: float = TOLERANCES["fp32"]) -> Probe:
    """Of three servers whose log-probs are off by so much, by their number."""

    def handle(number: int, post: Post) -> Answer:
        assert post.path == "/ask"
        assert post.body is not None
        ask: Ask = post.body["ask"]
        assert (ask.token_ids, ask.max_tokens, ask.params.stop_ids) == (probe_ids(512), SAMPLED_TOKENS, frozenset())
        return Answer(TOKENS, tuple(-token / 10 + off_by.get(number, 0.0) for token in TOKENS), "length", 7)

    return Probe(Servers(handle, 3), PlainDialect(), probe_ids(512), scored, tolerance)  # type: ignore[arg-type]


def test_the_largest_difference_of_all_servers_is_told() -> None:
    assert probe({}).check(None, 7) == pytest.approx(0.0, abs=1e-12)
    assert probe({0: 1e-5, 2: -4e-4}).check(None, 7) == pytest.approx(4e-4)


@pytest.mark.parametrize("difference", [0.08, -0.08, math.nan])
def test_wrong_weights_stop_the_run_with_both_values(difference: float) -> None:
    with pytest.raises(RolloutError) as raised:
        probe({1: difference}).check(None, 7)
    message = str(raised.value)
    assert "server 1 does not hold the weights of version 7" in message
    assert "the trainer's -4.0000, -4.1000, -4.2000, -4.3000, ..." in message
    assert ("-3.9200, -4.0200" if difference > 0 else "-4.0800, -4.1800" if difference < 0 else "nan, nan") in message


def test_a_rounding_server_has_its_own_tolerance() -> None:
    assert probe({0: 0.02}, TOLERANCES["bf16"]).check(None, 7) == pytest.approx(0.02)
    with pytest.raises(RolloutError, match="server 0"):
        probe({0: 0.2}, TOLERANCES["bf16"]).check(None, 7)


def test_an_answer_without_tokens_is_no_probe() -> None:
    servers = Servers(lambda number, post: Answer((), (), "abort", 7))
    with pytest.raises(RolloutError, match="server 0 gave the probe 0 tokens"):
        Probe(servers, PlainDialect(), probe_ids(512), scored, 1.0).check(None, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab", [61, 512, 151_936])
def test_probe_tokens_are_of_the_vocabulary_and_differ(vocab: int) -> None:
    found = probe_ids(vocab)
    assert len(set(found)) == len(found) == PROMPT_TOKENS
    assert 0 <= min(found) <= max(found) < vocab
