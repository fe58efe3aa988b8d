"""The engine of servers on several ranks; servers stand in as objects that answer by a rule."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from gspo_moe.errors import Interrupted, RolloutError
from gspo_moe.parallel.groups import Groups, initialize, shut_down
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.rollout.engine import Request, SamplingParams, WeightSink
from gspo_moe.rollout.servers.engine import ServerEngine
from gspo_moe.rollout.servers.labels import policy_version
from gspo_moe.rollout.servers.records import Answer, Ask
from gspo_moe.types import Rollout
from tests.launch import launch
from tests.qwen3 import layout
from tests.servers import Servers

END, LONGEST = 9, 6


class Rule(Servers):
    """Answers each Ask with its last token plus one, two, ..., at most two of them before it breaks off.

    The policy changes with every break. fail: the uid that is refused; hang: that is never answered.
    """

    def __init__(self, fail: str = "", hang: str = "") -> None:
        super().__init__()
        self.asks: list[Ask] = []
        self._fail, self._hang = fail, hang

    def submit(self, ask: Ask) -> Future[Answer]:
        self.asks.append(ask)
        future: Future[Answer] = Future()
        if ask.uid == self._fail:
            future.set_exception(RolloutError(f"{ask.uid} cannot be answered"))
        elif ask.uid != self._hang:
            threading.Timer(0.01 * (ask.sample_index + 1), lambda: future.set_result(rule(ask))).start()
        return future


def rule(ask: Ask) -> Answer:
    last, version = ask.token_ids[-1], 3 + ask.sampled // 2
    whole = [min(last + step, END) for step in range(1, ask.max_tokens + 1)]
    ids = tuple(whole[: whole.index(END) + 1] if END in whole else whole)
    finish: Any = "stop" if ids[-1] == END else "length"
    if len(ids) > 2:
        ids, finish = ids[:2], "abort"
    rows = np.arange(len(ask.token_ids) + len(ids) - 1)[:, None, None] + 100 * version
    return Answer(
        ids, tuple(-0.125 * token for token in ids), finish, version, rows if ask.params.report_routes else None
    )


class Sink:
    def __init__(self) -> None:
        self.versions: list[int] = []

    def publish(self, model: Any, version: int) -> Mapping[str, float]:
        self.versions.append(version)
        return {"sync/seconds": 0.5}


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(1.0, 1.0, 0, LONGEST, frozenset({END}), "1/0", **changes)


def expected(request: Request, k: int) -> Rollout:
    """By hand: two tokens a version, until END or the limit."""
    last = request.prompt_ids[-1]
    ids = [min(last + step, END) for step in range(1, LONGEST + 1)]
    ids = ids[: ids.index(END) + 1] if END in ids else ids
    stretches = [(3 + start // 2, len(ids[start : start + 2])) for start in range(0, len(ids), 2)]
    return Rollout(
        uid=request.uid,
        sample_index=k,
        token_ids=(*request.prompt_ids, *ids),
        policy_mask=(0,) * len(request.prompt_ids) + (1,) * len(ids),
        log_probs=tuple(-0.125 * token for token in ids),
        finish="stop" if ids[-1] == END else "length",
        versions=tuple(stretches),
    )


def requests(rank: int) -> list[Request]:
    """Rank 0's are more than rank 1's."""
    return [Request(f"train/{rank}/{n}", (1, n % 8), samples=2) for n in range(5 - 3 * rank)]


def engine(
    groups: Groups, servers: Rule, stop: StopSignals | None = None, sink: WeightSink | None = None
) -> ServerEngine:
    return ServerEngine(servers if groups.model.rank() == 0 else None, sink or Sink(), groups, longest=12, stop=stop)


def four_ranks(fault: bool) -> None:
    groups = initialize(layout(4, tensor=2), seed=1)
    data, servers, sink = groups.data_context.rank(), Rule(fail="train/1/0" if fault else ""), Sink()
    made = engine(groups, servers, sink=sink)
    try:
        told: list[tuple[int, int]] = []
        if fault:
            with pytest.raises(RolloutError, match="train/1/0 cannot be answered"):
                made.generate(requests(data), params())
            return
        first = groups.model.rank() == 0
        for version in (3, 4, 2, 3, 3):  # taken back, twice
            assert made.publish(None, version) == {"sync/seconds": 0.5}
        labels = sink.versions
        assert all(one < other for one, other in pairwise(labels))
        assert [policy_version(label) for label in labels] == [3, 4, 2, 3, 3]
        assert gather_objects(labels) == [labels] * 4
        assert servers.expected == (labels if first else [])

        def ended(number: int, rollout: Rollout) -> None:
            assert rollout.routes is None
            told.append((number, rollout.sample_index))

        found = made.generate(requests(data), params(report_routes=True), ended if first else None)
        assert found == [[expected(one, k) for k in range(2)] for one in requests(data)]
        for row in found:
            for one in row:
                assert one.routes is not None
                lengths = [count for _, count in one.versions]
                rows = [
                    version for (version, _), count in zip(one.versions, lengths, strict=True) for _ in range(count)
                ]
                rows = [rows[0]] * (len(one.token_ids) - 1 - len(rows)) + rows
                assert (one.routes[:, 0, 0] // 100).tolist() == rows
                assert (one.routes[:, 0, 0] % 100).tolist() == list(range(len(one.token_ids) - 1))
        assert sorted(told) == ([(n, k) for n in range(5 - 3 * data) for k in range(2)] if first else [])
        assert {ask.uid for ask in servers.asks} == ({one.uid for one in requests(data)} if first else set())
        if data:  # as a rank without a prompt
            assert made.generate([], params()) == []
        else:
            assert made.generate(requests(0)[:1], params())[0][0] == expected(requests(0)[0], 0)
        with pytest.raises(
            RolloutError, match=r"prompt x has 7 tokens and rollout\.max_response_tokens is 6, more than"
        ):
            made.generate([Request("x", (1,) * 7, 1)] if data else [], params())
        assert made.room(params()) == 6
        dist.barrier()
    finally:
        shut_down()


@pytest.mark.parametrize("fault", [False, True])
def test_first_ranks_ask_and_only_their_copy_of_the_model_is_told(fault: bool) -> None:
    launch(four_ranks, 4, fault)


def test_a_signal_ends_it_while_servers_work() -> None:
    groups, stop, servers = initialize(layout(), seed=1), StopSignals(), Rule(hang="train/0/1")
    try:
        made = engine(groups, servers, stop)
        with stop:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(Interrupted, match="ended by SIGTERM"):
                made.generate(requests(0), params())
    finally:
        shut_down()


def test_an_empty_prompt_is_refused() -> None:
    groups = initialize(layout(), seed=1)
    try:
        with pytest.raises(RolloutError, match="prompt x is empty"):
            engine(groups, Rule()).generate([Request("x", (), 1)], params())
    finally:
        shut_down()
