"""What the trainer relies on of a server: the same tests ask the stand-in and, with `-m vllm`, a real vLLM.

The reference is transformers' model of the folder that the server says it serves, in float32.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.config.architecture import Architecture, architecture_from_hf
from gspo_moe.config.rollout import ServersConfig
from gspo_moe.errors import RolloutError
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.rollout.servers.checking import Sizes
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.records import Answer, Ask, Dialect, Served
from gspo_moe.rollout.servers.startup import differences
from gspo_moe.rollout.servers.vllm import Vllm
from tests.unit.rollout.servers.conftest import Contract

CLOSE = 2e-4  # nats, between two programs in float32


@dataclass(frozen=True)
class Side:
    """The server, and what it is compared with. sizes: of the model it serves."""

    fleet: Fleet
    dialect: Dialect
    served: Served
    sizes: Architecture
    model: Any

    def ask(self, tokens: int, *, seed: str = "1", prompt: int = 5, **params: Any) -> Ask:
        chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_ids": frozenset[int](), **params}
        prompt_ids = tuple((7 * position + 3) % self.sizes.vocab_size for position in range(prompt))
        return Ask(
            f"train/{seed}", 0, prompt_ids, tokens, SamplingParams(max_response_tokens=tokens, seed=seed, **chosen)
        )

    def answer(self, ask: Ask) -> Answer:
        return self.fleet.submit(ask).result(120)

    def load(self, folder: Path, version: int) -> None:
        self.fleet.everywhere(self.dialect.pause())
        for post in self.dialect.load_folder(str(folder), version):
            self.fleet.everywhere(post)
        self.fleet.everywhere(self.dialect.resume())


@pytest.fixture(scope="module")
def side(contract: Contract) -> Iterator[Side]:
    from transformers import AutoModelForCausalLM

    unknown = Vllm(Sizes(1, 1, 1, 1))
    first = Fleet(ServersConfig(urls=(contract.url,), health_seconds=1.0), unknown)
    assert first.wait_until_up(60) == {}
    served = unknown.served([first.everywhere(question)[0] for question in unknown.questions(1.0)], 1.0, False)
    first.close()
    sizes = architecture_from_hf(served.name)
    dialect = Vllm(Sizes(sizes.vocab_size, sizes.num_hidden_layers, sizes.num_experts, sizes.num_experts_per_tok))
    model = AutoModelForCausalLM.from_pretrained(served.name, dtype=torch.float32).eval()
    options = ServersConfig(urls=(contract.url,), timeout_seconds=60.0, health_seconds=1.0, retries=1)
    fleet = Fleet(options, dialect)
    found = Side(fleet, dialect, served, sizes, model)
    found.load(Path(served.name), 1)
    yield found
    fleet.close()


def log_probs(model: Any, ask: Ask, answer: Answer) -> list[float]:
    """Of the answer's tokens, at temperature 1."""
    whole = torch.tensor([ask.token_ids + answer.token_ids])
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0].double().log_softmax(-1)
    before = len(ask.token_ids) - 1
    return [float(logits[before + place, token]) for place, token in enumerate(answer.token_ids)]


def test_log_probs_are_the_model_s(side: Side) -> None:
    for params in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}):
        ask = side.ask(12, **params)
        answer = side.answer(ask)
        assert (len(answer.token_ids), answer.finish, answer.version) == (12, "length", 1)
        np.testing.assert_allclose(answer.log_probs, log_probs(side.model, ask, answer), atol=CLOSE)


def test_greedy_answers_are_the_likeliest_tokens(side: Side) -> None:
    ask = side.ask(8, temperature=0.0)
    whole = torch.tensor([ask.token_ids])
    with torch.no_grad():
        for _ in range(8):
            whole = torch.cat([whole, side.model(input_ids=whole).logits[:, -1:].argmax(-1)], dim=1)
    assert side.answer(ask).token_ids == tuple(whole[0, len(ask.token_ids) :].tolist())


def test_answers_end_with_an_end_token_and_no_other(side: Side) -> None:
    free = side.answer(side.ask(20))
    end = free.token_ids[6]
    first = free.token_ids.index(end)
    answer = side.answer(side.ask(20, stop_ids=frozenset({end})))
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.finish == "stop"


def test_a_seed_fixes_what_is_sampled(side: Side) -> None:
    asks = [side.ask(16, seed=seed) for seed in "1231"]
    answers = [side.answer(ask).token_ids for ask in asks]
    assert answers[0] == answers[3]
    assert len(set(answers)) == 3


def test_routes_are_the_model_s(side: Side) -> None:
    ask = side.ask(6, report_routes=True)
    for _ in range(2):  # the second time the prompt may come from a prefix cache
        answer = side.answer(ask)
        with torch.no_grad():
            output = side.model(input_ids=torch.tensor([ask.token_ids + answer.token_ids]), output_router_logits=True)
        topk = side.sizes.num_experts_per_tok
        expected = torch.stack([scores.topk(topk).indices for scores in output.router_logits], dim=1)[:-1]
        assert answer.routes is not None
        assert np.array_equal(np.sort(answer.routes, -1), expected.sort(-1).values.numpy())


def test_a_folder_s_weights_are_taken_with_their_version(side: Side, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(side.served.name, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    other.save_pretrained(tmp_path / "other")
    try:
        side.load(tmp_path / "other", 2)
        assert side.dialect.version(side.fleet.everywhere(side.dialect.weights())[0]) == 2
        ask = side.ask(12)
        answer = side.answer(ask)
        assert answer.version == 2
        np.testing.assert_allclose(answer.log_probs, log_probs(other, ask, answer), atol=CLOSE)
        assert max(np.abs(np.subtract(answer.log_probs, log_probs(side.model, ask, answer)))) > 0.01
    finally:
        side.load(Path(side.served.name), 1)


def test_a_pause_breaks_answers_off_and_they_can_be_gone_on_with(side: Side) -> None:
    longest = side.sizes.max_positions
    asks = [side.ask(longest - 6, seed=str(number)) for number in range(8)]  # more than are sampled before the pause
    futures = [side.fleet.submit(ask) for ask in asks]
    time.sleep(0.05)
    side.fleet.everywhere(side.dialect.pause())
    late = side.fleet.submit(side.ask(2))
    answers = [future.result(60) for future in futures]
    resumed = threading.Timer(0.5, lambda: side.fleet.everywhere(side.dialect.resume()))
    resumed.start()
    assert late.result(60).finish == "length"
    resumed.join()
    broken = [(ask, one) for ask, one in zip(asks, answers, strict=True) if one.finish == "abort"]
    ask, answer = max(broken, key=lambda each: len(each[1].token_ids))
    count = len(answer.token_ids)
    assert count < ask.max_tokens
    rest = replace(ask, token_ids=ask.token_ids + answer.token_ids, max_tokens=3, sampled=count)
    more = side.answer(rest)
    np.testing.assert_allclose(more.log_probs, log_probs(side.model, rest, more), atol=CLOSE)


def test_it_tells_which_model_it_serves(side: Side) -> None:
    assert (side.served.dtype, side.served.positions) == ("fp32", side.sizes.max_positions)
    assert list(differences(side.served, side.sizes)) == []
    other = side.sizes.model_copy(update={"num_experts": 2 * side.sizes.num_experts})
    (fault,) = differences(side.served, other)
    assert f"num_experts is {side.sizes.num_experts} there and {other.num_experts} here" in fault


def test_answers_that_the_context_cuts_off_are_refused(side: Side) -> None:
    longest = side.sizes.max_positions
    with pytest.raises(
        RolloutError, match=f"it was cut off behind 3 of 5 tokens, {longest - 3} tokens of prompt before"
    ):
        side.answer(side.ask(5, prompt=longest - 3))


def test_what_cannot_be_asked_is_refused_at_once(side: Side) -> None:
    before = time.monotonic()
    with pytest.raises(RolloutError, match="HTTP 400"):
        side.answer(side.ask(1, prompt=side.sizes.max_positions + 1))
    assert time.monotonic() - before < 30
