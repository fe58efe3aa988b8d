"""Servers that die, hang or are away while weights go out: the others get all of them, and the run ends with the last.

Each server is a process of its own, the stand-in; the probe holds its log-probs against the trainer's.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.rollout import ServersConfig
from gspo_moe.errors import RolloutError
from gspo_moe.model.build import Model
from gspo_moe.model.weights import RandomSource, load_weights
from gspo_moe.rollout.engine import WeightSink
from gspo_moe.rollout.servers.broadcast_sink import BroadcastSink
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.folder_sink import FolderSink
from gspo_moe.rollout.servers.ipc_sink import IpcSink
from gspo_moe.rollout.servers.labels import next_label
from gspo_moe.rollout.servers.probe import Probe, probe_ids
from gspo_moe.rollout.servers.records import Answer, Ask
from gspo_moe.training.servers import log_probs_of
from tests.e2e.program import ROOT, Program
from tests.launch import free_ports
from tests.qwen3 import architecture, built, layout
from tests.servers import TRANSFER
from tests.support.stand_in import SHARED, Running
from tests.unit.rollout.servers.conftest import TINY
from tests.unit.rollout.servers.test_fleet import asks, eventually

SIZES = architecture(initializer_range=0.2)
COUNT = 5
LOOK = 0.1  # seconds between two looks at a server


@pytest.fixture(scope="module")
def urls(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    port, script = free_ports(COUNT), ROOT / "tests" / "support" / "stand_in.py"
    command: list[str | Path] = [sys.executable, script, tiny_models[0], "--port", str(port), "--count", str(COUNT)]
    program = Program(command, tmp_path_factory.mktemp("servers"), PYTHONPATH=str(ROOT))
    yield [f"http://127.0.0.1:{port + number}" for number in range(COUNT)]
    program.kill()


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with built(SIZES, layout()) as model:
        yield model


Make = Callable[..., Fleet]


@pytest.fixture
def fleet() -> Iterator[Make]:
    made = list[Fleet]()

    def make(*urls: str) -> Fleet:
        options = ServersConfig(urls=urls, timeout_seconds=60.0, health_seconds=LOOK, outage_seconds=20.0, retries=6)
        made.append(Fleet(options, TINY))
        assert made[-1].wait_until_up(60.0) == {}
        return made[-1]

    yield make
    for one in made:
        one.close()


def call(url: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def order(url: str, fault: str, count: int) -> None:
    call(url, "/stand_in/fault", {"fault": fault, "count": count})


def asked(url: str) -> int:
    return call(url, "/stand_in/asked")["asked"]


def probe(fleet: Fleet) -> Probe:
    return Probe(fleet, TINY, probe_ids(SIZES.vocab_size), log_probs_of, 1e-4)


def publish(model: Model, sink: WeightSink, fleet: Fleet, version: int) -> None:
    load_weights(model, RandomSource(SIZES, seed=version))
    assert sink.publish(model, version)["sync/probe_difference"] < 1e-4
    fleet.expect(version)


def versions(fleet: Fleet) -> set[int]:
    return {future.result(60).version for future in [fleet.submit(ask) for ask in asks(10)]}


class UnderWay:
    """Answers that weights break off, and what is asked anew then: paused servers hold it, one that dies, too."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._again = fleet, list[Future[Answer]]()
        self._first = [(ask, fleet.submit(ask)) for ask in asks(12, tokens=100)]
        for ask, future in self._first:
            future.add_done_callback(partial(self._ended, ask))

    def _ended(self, ask: Ask, future: Future[Answer]) -> None:
        if future.result().finish == "abort":
            self._again.append(self._fleet.submit(replace(ask, max_tokens=4)))

    def check(self, version: int) -> None:
        finishes = [future.result(60).finish for _, future in self._first]
        assert len(self._again) == finishes.count("abort") > 0
        assert {future.result(60).version for future in self._again} == {version}


def test_a_server_that_dies_as_it_loads_a_folder_is_left(
    model: Model, urls: list[str], fleet: Make, tmp_path: Path
) -> None:
    stays, dies = urls[0], urls[3]
    both = fleet(stays, dies)
    sink = FolderSink(both, TINY, tmp_path, probe(both))
    publish(model, sink, both, 1)
    order(dies, "die", 1)
    under_way = UnderWay(both)
    publish(model, sink, both, 2)
    assert both.up == 1
    under_way.check(2)
    assert versions(both) == {2}
    order(stays, "unavailable", -1)
    try:
        with pytest.raises(RolloutError, match=r"0 of 2 rollout servers are up|no rollout server is up any more"):
            publish(model, sink, both, 3)
    finally:
        order(stays, "unavailable", 0)


@pytest.mark.slow
def test_a_server_that_hangs_in_a_broadcast_is_left_by_the_limit(model: Model, urls: list[str], fleet: Make) -> None:
    both = fleet(urls[0], urls[4])
    sink = BroadcastSink(both, TINY, TRANSFER, probe(both), "127.0.0.1", bucket_bytes=20_000, timeout_seconds=4.0)
    publish(model, sink, both, 1)
    order(urls[4], "stall", 2)
    publish(model, sink, both, 2)
    assert both.up == 1
    assert versions(both) == {2}


@pytest.mark.parametrize("sync", ["ipc", pytest.param("broadcast", marks=pytest.mark.slow)])
def test_a_server_that_was_lost_in_the_midst_of_an_update_is_let_in_by_the_next(
    sync: str, model: Model, urls: list[str], stand_ins: list[Running], fleet: Make
) -> None:
    """The stand-in, as vLLM does, refuses to begin another update while one is under way."""

    def export(buffer: torch.Tensor) -> dict[str, Any]:
        SHARED["the buffer"] = buffer
        return {"the buffer": None}

    here = urls[:2] if sync == "broadcast" else [one.url for one in stand_ins]  # whose memory is this process's
    both = fleet(*here)
    call(here[0], "/start_weight_update", {})  # by a trainer that was killed then
    sink: WeightSink = BroadcastSink(
        both, TINY, TRANSFER, probe(both), "127.0.0.1", bucket_bytes=20_000, timeout_seconds=4.0
    )
    if sync == "ipc":
        sink = IpcSink(both, TINY, probe(both), bucket_bytes=20_000, export=export)
    publish(model, sink, both, 1)
    order(here[1], "drop", 2)
    publish(model, sink, both, 2)
    assert both.up == 1
    assert versions(both) == {2}
    eventually(lambda: all(one.waits for one in both._links if not one.up))
    publish(model, sink, both, 3)
    assert both.up == 2
    assert versions(both) == {3}


def test_a_server_that_was_away_as_the_run_was_taken_back_waits_though_its_version_is_the_newest(
    model: Model, urls: list[str], fleet: Make
) -> None:
    main, second = fleet(*urls[:2]), fleet(*urls[:2])  # of the rank that gives weights, and of another
    call(urls[0], "/start_weight_update", {})  # by a trainer that was killed then
    sink = BroadcastSink(main, TINY, TRANSFER, probe(main), "127.0.0.1")
    label = next_label(0, 1, now=1.0)

    def publish_next(version: int) -> None:
        nonlocal label
        label = next_label(label, version, now=1.0)
        publish(model, sink, main, label)
        second.expect(label)

    for version in (1, 2, 3):
        publish_next(version)
        if version == 2:
            order(urls[1], "unavailable", -1)
            eventually(lambda: main.up == second.up == 1)
    publish_next(1)
    publish_next(2)
    order(urls[1], "unavailable", 0)
    before = asked(urls[1])
    time.sleep(5 * LOOK)
    assert versions(main) == versions(second) == {2}
    assert (main.up, second.up, asked(urls[1])) == (1, 1, before)
    started = fleet(*urls[:2])  # by a trainer that starts anew
    started.expect(label)
    assert started.up == 1
    publish_next(3)
    assert main.up == 2
    eventually(lambda: second.up == 2)
    assert versions(second) == {3}


def test_a_server_that_dies_in_a_broadcast_is_left_and_one_that_comes_back_waits_for_the_next(
    model: Model, urls: list[str], fleet: Make
) -> None:
    stays, dies, away = urls[:3]
    all_three = fleet(stays, dies, away)
    sink = BroadcastSink(all_three, TINY, TRANSFER, probe(all_three), "127.0.0.1", bucket_bytes=20_000)
    publish(model, sink, all_three, 1)

    order(away, "unavailable", -1)
    eventually(lambda: all_three.up == 2)
    publish(model, sink, all_three, 2)
    order(away, "unavailable", 0)
    before = asked(away)
    time.sleep(5 * LOOK)
    assert versions(all_three) == {2}
    assert (all_three.up, asked(away)) == (2, before), "it has the weights of version 1"
    publish(model, sink, all_three, 3)
    assert all_three.up == 3
    assert versions(all_three) == {3}
    assert asked(away) > before + 1, "not by the probe alone"

    order(dies, "die", 3)  # some buckets have come
    under_way = UnderWay(all_three)
    publish(model, sink, all_three, 4)
    assert all_three.up == 2
    under_way.check(4)
    assert versions(all_three) == {4}
    order(away, "unavailable", -1)
    order(stays, "die", 2)
    with pytest.raises(RolloutError, match=r"of 3 rollout servers are up|no rollout server is up any more"):
        publish(model, sink, all_three, 5)
