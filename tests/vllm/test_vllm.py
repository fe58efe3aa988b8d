"""A real vLLM in fp32 against transformers: what it samples, its routes, and the weights that the sinks give it."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from gspo_moe.errors import RolloutError
from gspo_moe.model.weights import RandomSource
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.rollout.servers.broadcast_sink import BroadcastSink
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.folder_sink import FolderSink, write_folder
from gspo_moe.rollout.servers.probe import Probe, probe_ids
from gspo_moe.rollout.servers.records import Answer, Ask, Post
from gspo_moe.rollout.servers.transfers import ABANDON, VllmTransfer
from gspo_moe.training.servers import log_probs_of
from tests.qwen3 import built, layout
from tests.vllm.conftest import SIZES, Running

pytestmark = pytest.mark.vllm

PARAMS = SamplingParams(1.0, 1.0, 0, 64, frozenset(), "seed", report_routes=True)
VERSIONS = itertools.count(1)  # of the one server that all tests use


def ask(uid: str, token_ids: tuple[int, ...], max_tokens: int = 12, sample: int = 0) -> Ask:
    return Ask(uid, sample, token_ids, max_tokens, PARAMS)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, SIZES.vocab_size, length).tolist())


class Reference:
    """transformers on a folder: log-probs and routes of given tokens."""

    def __init__(self, folder: Path) -> None:
        self._model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def check(self, asked: Ask, answer: Answer) -> None:
        tokens, routes = asked.token_ids + answer.token_ids, []
        gates = [layer.mlp.gate for layer in self._model.model.layers]
        hooks = [gate.register_forward_hook(lambda _, given, __: routes.append(given[0])) for gate in gates]
        log_probs_TV = self._model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for hook in hooks:
            hook.remove()
        start = len(asked.token_ids)
        expected = [float(log_probs_TV[place - 1, tokens[place]]) for place in range(start, len(tokens))]
        assert answer.log_probs == pytest.approx(expected, abs=1e-4)
        picked = [
            (hidden.flatten(0, -2) @ gate.weight.T).topk(SIZES.num_experts_per_tok).indices
            for hidden, gate in zip(routes, gates, strict=True)
        ]
        assert answer.routes is not None
        np.testing.assert_array_equal(np.sort(answer.routes), np.sort(torch.stack(picked, 1).numpy())[:-1])


def check_all(running: Running, reference: Reference, asks: list[Ask]) -> list[Answer]:
    answers = [future.result(300) for future in [running.fleet.submit(one) for one in asks]]
    for one, answer in zip(asks, answers, strict=True):
        assert len(answer.token_ids) == one.max_tokens
        reference.check(one, answer)
    return answers


def probe(running: Running) -> Probe:
    return Probe(running.fleet, running.dialect, probe_ids(SIZES.vocab_size), log_probs_of, 1e-3)


def publish(running: Running, seed: int) -> tuple[int, Reference]:
    """The server gets random weights of this seed through a folder."""
    version = next(VERSIONS)
    with model(seed) as policy:
        sink = FolderSink(running.fleet, running.dialect, running.folder / "weights", probe(running), 200_000)
        figures = sink.publish(policy, version)
    assert figures["sync/probe_difference"] < 1e-4
    return version, Reference(running.folder / "weights" / f"version-{version:08d}")


def model(seed: int) -> Any:
    return built(SIZES, layout(), Drawn(seed))


class Drawn(RandomSource):
    """Weights so large that other ones give quite other log-probs."""

    def __init__(self, seed: int) -> None:
        super().__init__(SIZES, seed)

    def get(self, name: str) -> torch.Tensor:
        found = super().get(name)
        return found if name.endswith("norm.weight") else 10 * found


def test_log_probs_and_routes_are_those_of_the_same_tokens_in_transformers(running: Running) -> None:
    _, reference = publish(running, seed=0)
    prompts = [prompt(length, seed=length) for length in (1, 3, 17, 40, 64, 130)]
    first = check_all(running, reference, [ask(f"a{n}", tokens) for n, tokens in enumerate(prompts)])
    hits = running.metric("vllm:prefix_cache_hits_total")
    # Another turn goes on behind an answer, whose blocks and the prompt's the server still has.
    turns = [tokens + answer.token_ids + prompt(5, seed=9) for tokens, answer in zip(prompts, first, strict=True)]
    check_all(running, reference, [ask(f"b{n}", tokens) for n, tokens in enumerate(turns)])
    assert running.metric("vllm:prefix_cache_hits_total") > hits


def test_routes_stay_aligned_through_preemption(running: Running) -> None:
    _, reference = publish(running, seed=1)
    before = running.metric("vllm:num_preemptions_total")
    check_all(running, reference, [ask(f"p{n}", prompt(20 + n, seed=n), max_tokens=100) for n in range(14)])
    assert running.metric("vllm:num_preemptions_total") > before


def test_prompts_in_several_parts_are_sampled_by_their_seed(running: Running) -> None:
    _, reference = publish(running, seed=11)
    asks = [ask(f"part{n}", prompt(150, seed=40 + n), max_tokens=4) for n in range(4)]  # more than a pass takes
    together = check_all(running, reference, asks)
    alone = [check_all(running, reference, [one])[0] for one in asks]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_a_folder_and_a_broadcast_bring_the_trainers_weights(running: Running) -> None:
    tokens = prompt(21, seed=3)
    version, reference = publish(running, seed=2)
    (of_folder,) = check_all(running, reference, [ask("w", tokens)])
    assert of_folder.version == version

    version = next(VERSIONS)
    sink = BroadcastSink(
        running.fleet, running.dialect, VllmTransfer(), probe(running), "127.0.0.1", bucket_bytes=100_000
    )
    for seed in (4, 5):
        with model(seed) as policy:
            figures = sink.publish(policy, version)
            write_folder(policy, running.folder / "same")
        assert figures["sync/probe_difference"] < 1e-4
        (of_broadcast,) = check_all(running, Reference(running.folder / "same"), [ask("w", tokens)])
        assert of_broadcast.version == version
        version = next(VERSIONS)


class BreaksOff:
    """The fleet, but for the third bucket: that one comes, and its answer does not."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self.buckets = fleet, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)

    def everywhere(self, post: Post) -> list[Any]:
        found = self._fleet.everywhere(post)
        self.buckets += post.path == "/update_weights"
        if post.path == "/update_weights" and self.buckets == 3:
            raise RolloutError("planted")
        return found


def test_a_broadcast_that_breaks_off_begins_anew(running: Running) -> None:
    fleet: Any = BreaksOff(running.fleet)
    sink = BroadcastSink(fleet, running.dialect, VllmTransfer(), probe(running), "127.0.0.1", bucket_bytes=100_000)
    version = next(VERSIONS)
    with model(12) as policy:
        assert sink.publish(policy, version)["sync/probe_difference"] < 1e-4
        write_folder(policy, running.folder / "anew")
    assert fleet.buckets > 6
    (answer,) = check_all(running, Reference(running.folder / "anew"), [ask("anew", prompt(19, seed=2))])
    assert answer.version == version
    running.fleet.expect(version)


def test_an_update_in_which_a_worker_failed_is_abandoned_and_the_server_goes_on(running: Running) -> None:
    version, reference = publish(running, seed=13)
    running.fleet.everywhere(running.dialect.pause())
    for _ in range(2):
        running.fleet.everywhere(Post("/start_weight_update", {}))
        bucket = {"names": ["lm_head.weight"], "dtypes": [], "shapes": []}
        with pytest.raises(RolloutError, match="update_weights was answered with HTTP 500"):
            running.fleet.everywhere(Post("/update_weights", {"update_info": bucket}))
    for _ in range(2):
        running.fleet.everywhere(ABANDON)  # the second time there is none
    running.fleet.everywhere(running.dialect.resume())
    (answer,) = check_all(running, reference, [ask("abandoned", prompt(19, seed=3))])
    assert answer.version == version


def test_the_probe_tells_of_weights_that_a_server_took_wrongly(running: Running) -> None:
    publish(running, seed=6)
    version = next(VERSIONS)
    with model(7) as policy:
        write_folder(policy, running.folder / "reloaded")
        running.fleet.everywhere(running.dialect.pause())
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(running.folder / "reloaded")}}
        running.fleet.everywhere(Post("/collective_rpc", reload))  # vLLM's own, which answers 200
        running.fleet.everywhere(Post("/update_weight_version", {"new_version": str(version)}))
        running.fleet.everywhere(running.dialect.resume())
        with pytest.raises(RolloutError, match=f"does not hold the weights of version {version} that it was sent"):
            probe(running).check(policy, version)
    publish(running, seed=7)


def test_a_folder_that_lacks_tensors_is_refused_and_the_server_goes_on(running: Running, tmp_path: Path) -> None:
    _, reference = publish(running, seed=8)
    running.fleet.everywhere(running.dialect.pause())
    with pytest.raises(RolloutError, match=r"does not hold lm_head\.weight"):
        running.fleet.everywhere(Post("/collective_rpc", {"method": "load_folder", "args": [str(tmp_path), 1]}))
    running.fleet.everywhere(running.dialect.resume())
    check_all(running, reference, [ask("still there", prompt(9, seed=1))])


def test_a_pause_breaks_answers_off_and_holds_new_ones_until_it_ends(running: Running) -> None:
    _, reference = publish(running, seed=9)
    long = [ask(f"l{n}", prompt(10, seed=n), max_tokens=400) for n in range(2)]
    futures: list[Future[Answer]] = [running.fleet.submit(one) for one in long]
    time.sleep(1.0)
    running.fleet.everywhere(running.dialect.pause())
    broken = [future.result(60) for future in futures]
    held = running.fleet.submit(ask("held", prompt(7, seed=0)))
    for one, answer in zip(long, broken, strict=True):
        assert answer.finish == "abort"
        assert 0 < len(answer.token_ids) < 400
        reference.check(one, answer)
    time.sleep(0.5)
    assert not held.done()
    running.fleet.everywhere(running.dialect.resume())
    assert held.result(60).finish == "length"
    # What was broken off goes on where it ended, under whatever weights there are by then.
    rest = [ask(one.uid, one.token_ids + a.token_ids, 12) for one, a in zip(long, broken, strict=True)]
    check_all(running, reference, rest)


def test_rollouts_do_not_hang_on_what_else_the_server_works_on(running: Running) -> None:
    publish(running, seed=10)
    alone = running.fleet.submit(ask("same", prompt(30, seed=4), 24)).result(60)
    crowd = [running.fleet.submit(ask(f"c{n}", prompt(11 * n + 1, seed=n), 24)) for n in range(8)]
    among = running.fleet.submit(ask("same", prompt(30, seed=4), 24)).result(60)
    assert [future.result(60).finish for future in crowd] == ["length"] * 8
    assert among.token_ids == alone.token_ids
