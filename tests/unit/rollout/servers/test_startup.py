"""What a run says of servers that do not fit it, before its first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config.loading import load_config
from gspo_moe.config.rollout import ServersConfig
from gspo_moe.errors import ConfigError
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.records import Post
from gspo_moe.rollout.servers.startup import SAMPLE, Expected, check_servers
from tests.launch import free_port
from tests.policy import Letters
from tests.qwen3 import architecture
from tests.support.stand_in import Running
from tests.unit.rollout.servers.conftest import TINY


def check(
    urls: list[str],
    *,
    tokenizer: Any = None,
    temperature: float = 1.0,
    seconds: float = 5.0,
    routes: bool = False,
    **sizes: int,
) -> list[Any]:
    fleet = Fleet(ServersConfig(urls=tuple(urls), health_seconds=0.1), TINY)
    tokens: Any = tokenizer or Letters()
    expected = Expected(architecture(**sizes), tokens, temperature, routes=routes)
    try:
        return check_servers(fleet, ServersConfig(urls=tuple(urls), start_seconds=seconds), TINY, expected)
    finally:
        fleet.close()


def test_servers_that_fit_say_what_they_are(stand_ins: list[Running], tiny_models: tuple[Path, Path]) -> None:
    found = check([one.url for one in stand_ins])
    assert [(one.name, one.positions, one.dtype) for one in found] == [(str(tiny_models[0]), 128, "fp32")] * 2


def test_an_unreachable_server_is_named(stand_ins: list[Running]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError) as caught:
        check([stand_ins[0].url, nowhere], seconds=0.3)
    said = str(caught.value)
    assert re.match(
        rf"rollout\.servers\.urls: {nowhere} was not healthy within 0\.3 s \(GET {nowhere}/health broke off", said
    )
    assert "start it (launch/with_servers.sh), mend the address, or raise rollout.servers.start_seconds" in said
    assert stand_ins[0].url not in said


def test_a_server_that_is_late_is_waited_for(tiny_models: tuple[Path, Path], stand_ins: list[Running]) -> None:
    stand_ins[0].order("unavailable", 3)
    assert len(check([one.url for one in stand_ins], seconds=20.0)) == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 16}, "num_experts is 8 there and 16 here"),
        ({"vocab_size": 64}, "vocab_size is 61 there and 64 here"),
        (
            {"hidden_size": 64, "num_hidden_layers": 3},
            "hidden_size is 32 there and 64 here; num_hidden_layers is 2 there",
        ),
    ],
)
def test_another_model_is_refused(sizes: dict[str, Any], message: str, stand_ins: list[Running]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"it serves another model ({message}")) as caught:
        check([one.url for one in stand_ins], **sizes)
    assert len(str(caught.value).splitlines()) == 2


@pytest.fixture
def other_tokens(tiny_models: tuple[Path, Path], stand_ins: list[Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers have a tokenizer, which is not the run's."""
    letters: Any = Letters()
    monkeypatch.setattr("gspo_moe.data.tokenizers.own_tokenizer", lambda *_: letters)


def test_another_tokenizer_is_refused(other_tokens: None, stand_ins: list[Running]) -> None:
    class Others(Letters):
        def encode(self, text: str) -> list[int]:
            return [*super().encode(text)[:4], 1, 2]

    urls = [stand_ins[0].url]
    check(urls)
    message = (
        f"its tokenizer is another one: it makes {len(SAMPLE)} tokens of {SAMPLE!r} and the run's 6, from token 5 on"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(urls, tokenizer=Others())


def test_log_probs_of_another_distribution_are_refused(stand_ins: list[Running]) -> None:
    with pytest.raises(
        ConfigError, match="by --logprobs-mode raw_logprobs; start it with --logprobs-mode processed_logp"
    ):
        check([stand_ins[0].url], temperature=0.8)


def test_routes_that_a_server_does_not_report_are_missed_before_the_first_step(tiny_models: tuple[Path, Path]) -> None:
    plain = Running(tiny_models[0])
    try:
        check([plain.url])
        with pytest.raises(
            ConfigError, match=r"it reports no routes of experts.*start it with --enable-return-routed-exp"
        ):
            check([plain.url], routes=True)
    finally:
        plain.stop()


def test_what_is_no_server_of_ours_is_refused(stand_ins: list[Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TINY), "questions", lambda *_: (Post("/weight_info"), Post("/weight_info")))
    with pytest.raises(ConfigError, match=r"does not describe itself as expected \(KeyError: .*start vllm as launch/"):
        check([stand_ins[0].url])
    monkeypatch.setattr(type(TINY), "questions", lambda *_: (Post("/nothing"),))
    with pytest.raises(
        ConfigError, match=r"HTTP 404: .*start vllm as launch/with_servers\.sh does, in development mode"
    ):
        check([stand_ins[0].url])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine=vllm"], "rollout.engine=vllm has no server to ask; name them (rollout.servers.urls="),
        (["rollout.servers.urls=[http://a:1]"], "with rollout.engine=megatron, which asks no server"),
        (["rollout.engine=vllm", "rollout.servers.urls=[a:1]"], "rollout.servers.urls: a:1 is no address"),
        (["rollout.engine=vllm", "rollout.servers.urls=[http://a:1, http://a:1]"], "names http://a:1 twice"),
        (
            ["rollout={engine: vllm, temperature: 0.9, top_p: 0.9}", "rollout.servers.urls=[http://a:1]"],
            "training needs those of the whole distribution; set temperature=1, or top_p=1 and top_k=0",
        ),
        (["stage=sft", "rollout.engine=vllm", "rollout.servers.urls=[http://a:1]"], "set rollout.engine=megatron"),
    ],
)
def test_configs_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, overrides)
