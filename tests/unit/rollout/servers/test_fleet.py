"""Many servers, some of which fail: every Ask has one good answer, whatever happens to servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_moe.config.rollout import ServersConfig
from gspo_moe.errors import RolloutError
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.rollout.servers.counters import Counters, server_metrics
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.records import Ask, Post
from gspo_moe.rollout.servers.transfers import ABANDON
from tests.launch import free_port
from tests.support.stand_in import Running
from tests.unit.rollout.servers.conftest import TINY

QUICK = ServersConfig(timeout_seconds=20.0, health_seconds=0.1, outage_seconds=20.0, retries=4)
Make = Callable[..., Fleet]


@pytest.fixture
def fleet() -> Iterator[Make]:
    made = list[Fleet]()

    def make(servers: list[Running], options: ServersConfig = QUICK, others: tuple[str, ...] = ()) -> Fleet:
        urls = (*(one.url for one in servers), *others)
        made.append(Fleet(options.model_copy(update={"urls": urls}), TINY))
        return made[-1]

    yield make
    for one in made:
        one.close()


def publish(fleet: Fleet, folder: Path, version: int) -> None:
    fleet.everywhere(TINY.pause())
    for post in TINY.load_folder(str(folder), version):
        fleet.everywhere(post)
    fleet.everywhere(TINY.resume())
    fleet.expect(version)


def asks(count: int, tokens: int = 4, routes: bool = False) -> list[Ask]:
    params = SamplingParams(1.0, 1.0, 0, tokens, frozenset(), "1/0", report_routes=routes)
    return [Ask(f"train/{number}", 0, (3, number % 60, 5), tokens, params) for number in range(count)]


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not so in time"
        time.sleep(0.02)


def test_servers_share_the_work(stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make) -> None:
    both = fleet(stand_ins)
    publish(both, tiny_models[0], 3)
    answers = [future.result(60) for future in [both.submit(ask) for ask in asks(40)]]
    assert {(len(one.token_ids), one.version) for one in answers} == {(4, 3)}
    counts = [one.server.asked for one in stand_ins]
    assert sum(counts) == 40
    assert min(counts) >= 15
    counted = both.take_counters()
    assert (counted.answers, counted.tokens, counted.retries, counted.in_flight) == (40, 160, 0, 0)
    assert both.take_counters().answers == 0


def test_no_server_gets_more_than_its_concurrency(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    few = fleet(stand_ins, ServersConfig(concurrency=3))
    publish(few, tiny_models[0], 1)
    for future in [few.submit(ask) for ask in asks(30)]:
        future.result(60)
    assert few.take_counters().most == 6


@pytest.mark.parametrize(
    "fault",
    ["no_log_probs", "too_many_log_probs", "nan", "token", "too_long", "garbage", "cut", "error", "unavailable"],
)
def test_a_damaged_answer_is_asked_for_again(
    fault: str, stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    both = fleet(stand_ins)
    publish(both, tiny_models[0], 1)
    good = [both.submit(ask).result(60) for ask in asks(6, routes=True)]
    stand_ins[0].order(fault, 2)
    again = [future.result(60) for future in [both.submit(ask) for ask in asks(6, routes=True)]]
    for one, other in zip(good, again, strict=True):
        assert (one.token_ids, one.log_probs) == (other.token_ids, other.log_probs)
    counted = both.take_counters()
    assert counted.answers == 12
    assert counted.retries >= (1 if fault == "unavailable" else 2)  # a look at its health may take one of these


def test_a_fault_that_stays_ends_with_both_values(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    alone = fleet(stand_ins[:1], ServersConfig(health_seconds=0.1, retries=2))
    publish(alone, tiny_models[0], 1)
    stand_ins[0].order("too_many_log_probs", -1)
    with pytest.raises(
        RolloutError, match=r"it has 5 log-probs for 4 tokens; asked 3 times, as rollout\.servers\.retries=2"
    ):
        alone.submit(asks(1)[0]).result(60)


def test_a_hanging_server_s_requests_go_to_others(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    both = fleet(stand_ins, ServersConfig(timeout_seconds=2.0, health_seconds=0.1, retries=4))
    publish(both, tiny_models[0], 1)
    stand_ins[0].order("hang", 2)
    answers = [future.result(60) for future in [both.submit(ask) for ask in asks(10)]]
    assert len(answers) == 10
    assert both.take_counters().taken_out == 1


def test_a_dead_server_is_left_and_let_back_in_with_the_newest_weights(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    one, other = tiny_models
    both = fleet(stand_ins)
    publish(both, one, 1)
    futures = [both.submit(ask) for ask in asks(60, tokens=20)]
    eventually(lambda: any(future.done() for future in futures))
    port = stand_ins[1].port
    stand_ins.pop().stop()
    assert [future.result(60).version for future in futures] == [1] * 60
    eventually(lambda: both.up == 1)
    publish(both, other, 2)  # which the dead one misses
    stand_ins.append(Running(one, port=port))
    eventually(lambda: both.up == 2)
    assert stand_ins[1].server._version == "2"
    answers = [future.result(60) for future in [both.submit(ask) for ask in asks(20)]]
    assert {answer.version for answer in answers} == {2}
    assert stand_ins[1].server.asked > 0
    assert both.take_counters().taken_out == 1


def test_a_server_that_cannot_load_what_others_can_is_left(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    both = fleet(stand_ins)
    publish(both, tiny_models[0], 1)
    stand_ins[0].order("load_error", 1)
    publish(both, tiny_models[1], 2)
    assert both.take_counters().taken_out == 1
    assert stand_ins[1].server._version == "2"
    eventually(lambda: both.up == 2)
    assert stand_ins[0].server._version == "2", "by another try"
    for one in stand_ins:
        one.order("load_error", 1)
    with pytest.raises(RolloutError, match="collective_rpc was answered with HTTP 500"):
        publish(both, tiny_models[0], 3)


def test_a_server_that_cannot_abandon_an_update_is_left(stand_ins: list[Running], fleet: Make) -> None:
    both = fleet(stand_ins)
    stand_ins[1].order("no_abandon", 1)
    assert len(both.everywhere(ABANDON)) == 1
    assert "HTTP 400" in both._links[1].why
    for one in stand_ins:
        one.order("no_abandon", 1)
    with pytest.raises(RolloutError, match=r"no rollout server is up any more .*no such method"):
        both.everywhere(ABANDON)


def test_a_server_that_missed_weights_waits_for_the_process_that_has_them(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    main, second = fleet(stand_ins), fleet(stand_ins)
    publish(main, tiny_models[0], 1)
    second.expect(1)
    stand_ins[0].server._version = "0"
    answers = [future.result(60) for future in [second.submit(ask) for ask in asks(12)]]
    assert {answer.version for answer in answers} == {1}
    assert second.up == 1
    counted = second.take_counters()
    assert (counted.answers, counted.taken_out) == (12, 1)
    assert counted.retries > 0
    publish(main, tiny_models[1], 2)
    second.expect(2)
    eventually(lambda: second.up == 2)


def test_without_any_server_the_run_ends_and_says_why(stand_ins: list[Running], fleet: Make) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    none = fleet([], ServersConfig(health_seconds=0.05, outage_seconds=0.5), others=(nowhere,))
    assert list(none.wait_until_up(0.2)) == [nowhere]
    with pytest.raises(
        RolloutError, match=rf"no rollout server has been up for 0\.5 s \(GET {nowhere}/health broke off"
    ):
        none.submit(asks(1)[0]).result(60)
    with pytest.raises(RolloutError, match="0 of 1 rollout servers are up"):
        none.everywhere(Post("/health"))


def test_what_a_server_refuses_is_not_asked_again(stand_ins: list[Running], fleet: Make) -> None:
    both = fleet(stand_ins)
    with pytest.raises(RolloutError, match=r"was answered with HTTP 400: .*longer than the context"):
        both.submit(replace(asks(1)[0], token_ids=(3,) * 200)).result(60)
    with pytest.raises(RolloutError, match="was answered with HTTP 404"):
        both.everywhere(Post("/nothing"))
    assert both.take_counters().retries == 0


def test_each_server_can_be_told_something_else(stand_ins: list[Running], fleet: Make) -> None:
    both = fleet(stand_ins)
    posts = [Post("/update_weight_version", {"new_version": name}) for name in ("4", "5")]
    assert [body["new_version"] for body in both.each(posts)] == ["4", "5"]
    assert [body["weight_version"] for body in both.everywhere(Post("/weight_info"))] == ["4", "5"]
    with pytest.raises(RolloutError, match="2 of 2 rollout servers are up"):
        both.each(posts[:1])


def test_closing_gives_up_what_is_under_way(
    stand_ins: list[Running], tiny_models: tuple[Path, Path], fleet: Make
) -> None:
    both = fleet(stand_ins)
    publish(both, tiny_models[0], 1)
    stand_ins[0].order("hang", 1)
    stand_ins[1].order("hang", 1)
    futures = [both.submit(ask) for ask in asks(2)]
    eventually(lambda: all(one.server.asked for one in stand_ins))
    both.close()
    assert all(future.cancelled() for future in futures)


def test_figures_of_several_processes_on_a_clock_of_their_own() -> None:
    one, other = Counters(since=4.0, began=4.0), Counters(since=1.0, began=1.0)
    one.begin(10.0)
    one.begin(12.0)
    one.came(100, 3.0)
    one.end(13.0)
    one.came(50, 8.0)
    one.end(20.0)
    one.advance(30.0)
    other.retries, other.taken_out = 2, 1
    other.advance(5.0)
    assert (one.span, one.busy, one.most) == (10.0, 2 * 1 + 1 * 9, 2)
    found = server_metrics([one, other], [3, 2])
    assert found == pytest.approx(
        {
            "rollout/servers/up": 2.0,
            "rollout/servers/taken_out": 1.0,
            "rollout/servers/retries": 2.0,
            "queue/idle_seconds": (6.0 + 10.0 + 4.0) / 2,
            "rollout/servers/tokens_per_second": 15.0,
            "rollout/servers/latency_median_seconds": 5.5,
            "rollout/servers/latency_tail_seconds": 7.95,
            "rollout/servers/utilisation": 11.0 / 20.0,
        }
    )
    again = one.successor()
    again.begin(31.0)
    again.advance(32.0)
    assert (again.answers, again.busy, again.most, again.idle) == (0, 1.0, 1, 1.0)
    assert set(server_metrics([Counters()], [1])) == {
        "queue/idle_seconds",
        *(f"rollout/servers/{name}" for name in ("up", "taken_out", "retries")),
    }
