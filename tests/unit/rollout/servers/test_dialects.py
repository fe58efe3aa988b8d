"""What is sent to servers and what is made of their answers; vLLM's are recorded, SGLang's made after its sources."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.rollout.servers.checking import Sizes, seed_of
from gspo_moe.rollout.servers.records import Answer, Ask, BadAnswer, Post
from gspo_moe.rollout.servers.sglang import SGLang
from gspo_moe.rollout.servers.vllm import Vllm
from gspo_moe.rollout.stop_strings import StopStrings
from tests.policy import Letters

RECORDED = Path(__file__).parent / "vllm"
SIZES = Sizes(vocab=512, layers=3, experts=8, topk=2)
VLLM, SGLANG = Vllm(SIZES), SGLang(SIZES)


def recorded(name: str) -> tuple[dict[str, Any], Any]:
    """A request to vLLM and its answer."""
    found = json.loads((RECORDED / f"{name}.json").read_text())
    return found["request"], found["answer"]


def asked(request: dict[str, Any], stop: frozenset[int] = frozenset(), routes: bool = False) -> Ask:
    sampling = request["sampling_params"]
    params = SamplingParams(
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        top_k=sampling["top_k"],
        max_response_tokens=sampling["max_tokens"],
        stop_ids=stop,
        seed="1/0",
        report_routes=routes,
    )
    return Ask("train/7", 2, tuple(request["token_ids"]), sampling["max_tokens"], params)


@pytest.mark.parametrize("name", ["generate_length", "generate_stop", "generate_abort", "generate_temperature_half"])
def test_answers_of_vllm_are_read(name: str) -> None:
    request, body = recorded(name)
    choice = body["choices"][0]
    ask = asked(request, frozenset(request["sampling_params"].get("stop_token_ids", ())), routes=True)
    answer = VLLM.answer(ask, body)
    assert list(answer.token_ids) == choice["token_ids"]
    assert list(answer.log_probs) == [one["logprob"] for one in choice["logprobs"]["content"]]
    assert (answer.finish, answer.version) == (choice["finish_reason"], 3)
    array = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    assert answer.routes is not None
    np.testing.assert_array_equal(answer.routes, array)
    assert len(answer.routes) == len(ask.token_ids) + len(answer.token_ids) - 1
    assert VLLM.answer(replace(ask, params=replace(ask.params, report_routes=False)), body).routes is None


def test_what_vllm_is_sent_is_what_it_was_sent_when_recorded() -> None:
    request, _ = recorded("generate_stop")
    ask = asked(request, frozenset({350}))
    sampling = {**request["sampling_params"], "seed": seed_of(ask)}
    assert VLLM.ask(ask) == Post(
        "/inference/v1/generate", {"token_ids": request["token_ids"], "sampling_params": sampling}
    )
    unseeded = Vllm(SIZES, seeded=False).ask(ask).body
    assert unseeded is not None
    assert "seed" not in unseeded["sampling_params"]


def test_seeds_hang_on_what_is_asked() -> None:
    ask = asked(recorded("generate_stop")[0])
    others = (
        replace(ask, uid="train/8"),
        replace(ask, sample_index=3),
        replace(ask, token_ids=(*ask.token_ids, 4)),
        replace(ask, params=replace(ask.params, seed="1/1")),
    )
    seeds = {seed_of(one) for one in (ask, *others, replace(ask, max_tokens=1))}
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_control_requests_are_those_that_vllm_answered() -> None:
    load, name = VLLM.load_folder("/tmp/vtiny/b", 4)
    for post, file in ((load, "load_folder"), (name, "update_weight_version"), (VLLM.resume(), "resume")):
        found = json.loads((RECORDED / f"{file}.json").read_text())
        assert (post.path, post.body, found["status"]) == (found["path"], found["request"], 200)
    assert (load.version, name.version, VLLM.resume().version) == (4, 4, None)
    assert VLLM.pause().path.startswith(json.loads((RECORDED / "pause.json").read_text())["path"])
    _, weights = recorded("weight_info")
    assert VLLM.version(weights) == 5
    assert [VLLM.version(body) for body in ({"weight_version": "default"}, {}, "text")] == [None] * 3


def test_tokens_of_two_versions_are_refused() -> None:
    request, body = recorded("generate_two_versions")
    with pytest.raises(BadAnswer, match=r"the weights that sampled it 6 and 7|sampled it \d+ and \d+"):
        VLLM.answer(asked(request), body)


Damage = Callable[[dict[str, Any]], object]


def put(*path: Any) -> Damage:
    """Puts the last of `path` where the others lead to."""
    *steps, last, value = path

    def damage(body: dict[str, Any]) -> None:
        found: Any = body
        for step in steps:
            found = found[step]
        found[last] = value

    return damage


def more_log_probs(body: dict[str, Any]) -> None:
    content = body["choices"][0]["logprobs"]["content"]
    content.append(content[-1])


def npy(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


CHOICE = ("choices", 0)
DAMAGES: list[tuple[Damage, str]] = [
    (put("choices", []), r"it has no choices\.0"),
    (put(*CHOICE, "token_ids", None), "it has no token ids"),
    (put(*CHOICE, "token_ids", []), "it has no token and ended by 'length'"),
    (put(*CHOICE, "token_ids", [1] * 7), "it has 7 tokens where at most 6 were asked for"),
    (put(*CHOICE, "token_ids", 0, 512), "it has the token 512, and the tokenizer has those from 0 to 511"),
    (put(*CHOICE, "token_ids", 0, -1), "it has the token -1,"),
    (put(*CHOICE, "token_ids", 0, 3.0), r"it has the token 3\.0,"),
    (put(*CHOICE, "logprobs", None), "it has no log-probs for its 6 tokens"),
    (put(*CHOICE, "logprobs", "content", []), "it has 0 log-probs for 6 tokens"),
    (more_log_probs, "it has 7 log-probs for 6 tokens"),
    (put(*CHOICE, "logprobs", "content", 2, {"logprob": float("nan")}), "token 3 of 6 has the log-prob nan"),
    (put(*CHOICE, "logprobs", "content", 2, {"logprob": None}), "token 3 of 6 has the log-prob None"),
    (put(*CHOICE, "logprobs", "content", 2, {"logprob": -9999.0}), "token 3 of 6 has the log-prob None"),
    (put(*CHOICE, "logprobs", "content", 2, {"logprob": 0.5}), r"token 3 of 6 has the log-prob 0\.5, no number of at"),
    (put(*CHOICE, "logprobs", "content", 2, {}), "it has no logprob"),
    (put(*CHOICE, "finish_reason", "repetition"), "it ended by 'repetition', which is none of stop, length, abort"),
    (put(*CHOICE, "finish_reason", "stop"), r"it ended at token 152, and the run's end tokens are \[9\]"),
    (put(*CHOICE, "token_ids", 1, 9), "it has 6 tokens, and token 2 is 9, an end token of the run"),
    (put(*CHOICE, "weight_versions", None), "calls the weights that sampled it nothing"),
    (put(*CHOICE, "weight_versions", 0, "version", "default"), "calls the weights that sampled it default"),
    (put(*CHOICE, "routed_experts", None), "it has no routes of experts, which were asked for"),
    (put(*CHOICE, "routed_experts", "!"), "its routed_experts are no array in base64"),
    (put(*CHOICE, "routed_experts", npy(np.ones((15, 3, 2), int))), r"routes are int64 \[15, 3, 2\], and 17 tokens"),
    (put(*CHOICE, "routed_experts", npy(np.ones((16, 3, 2)))), r"its routes are float64 \[16, 3, 2\]"),
    (put(*CHOICE, "routed_experts", npy(np.full((16, 3, 2), 8))), "experts from 0 to 8, and the model has 8"),
    (put(*CHOICE, "routed_experts", npy(np.ones((16, 3, 2), int))), "its routes name an expert twice"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_answers_are_refused_with_both_values(damage: Damage, message: str) -> None:
    request, body = recorded("generate_length")
    broken = copy.deepcopy(body)
    damage(broken)
    with pytest.raises(BadAnswer, match=message) as caught:
        VLLM.answer(asked(request, frozenset({9}), routes=True), broken)
    assert "the answer to train/7, sample 2, cannot be used" in str(caught.value)


@pytest.mark.parametrize("body", [None, "text", [], {"choices": {}}, {"choices": [None]}, {"choices": [{}]}])
def test_what_is_no_answer_is_refused(body: Any) -> None:
    with pytest.raises(BadAnswer, match="it has no "):
        VLLM.answer(asked(recorded("generate_length")[0]), body)


def test_an_answer_that_was_cut_off_early_is_refused() -> None:
    request, body = recorded("generate_length")
    ask = replace(asked(request), max_tokens=9)
    with pytest.raises(BadAnswer, match="it was cut off behind 6 of 9 tokens, 11 tokens of prompt before them"):
        VLLM.answer(ask, body)


def test_an_abort_before_the_first_token_is_an_answer() -> None:
    request, body = recorded("generate_abort")
    empty = copy.deepcopy(body)
    empty["choices"][0].update(token_ids=[], logprobs={"content": []}, weight_versions=None, routed_experts=None)
    assert VLLM.answer(asked(request, routes=True), empty) == Answer((), (), "abort", -1)


def test_answers_end_at_stop_strings_with_what_belongs_to_their_tokens() -> None:
    request, body = recorded("generate_length")
    ids = body["choices"][0]["token_ids"]
    letters: Any = Letters()
    letters.vocab_size = 512
    strings = StopStrings((letters.decode(ids[2:4]),), letters)
    ask = asked(request, routes=True)
    ask = replace(ask, params=replace(ask.params, stop_strings=strings))
    whole = VLLM.answer(asked(request, routes=True), body)
    answer = VLLM.answer(ask, body)
    assert (answer.token_ids, answer.log_probs, answer.finish) == (whole.token_ids[:4], whole.log_probs[:4], "stop")
    assert whole.routes is not None
    np.testing.assert_array_equal(answer.routes, whole.routes[: len(ask.token_ids) + 3])
    # A string that began before the answer was broken off counts, one in the prompt does not.
    before = replace(ask, token_ids=(*ask.token_ids, ids[2]), params=replace(ask.params, report_routes=False))
    rest = copy.deepcopy(body)
    rest["choices"][0].update(token_ids=ids[3:4] * 6)
    assert VLLM.answer(replace(before, sampled=1), rest).token_ids == (ids[3],)
    assert VLLM.answer(before, rest).token_ids == (ids[3],) * 6


def test_vllm_says_what_it_serves(tmp_path: Path) -> None:
    (_, models), (_, info) = recorded("models"), recorded("server_info")
    served = VLLM.served([models, info], 1.0, False)
    assert (served.name, served.positions, served.dtype, served.routes) == ("/tmp/vtiny/a", 512, "fp32", True)
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    info["vllm_config"]["model_config"].update(model=str(tmp_path), dtype="torch.bfloat16")
    served = VLLM.served([models, info], 1.0, False)
    assert (served.name, served.keys, served.dtype) == (str(tmp_path), {"vocab_size": 512}, "bfloat16")
    assert VLLM.questions(1.0)[1].path == json.loads((RECORDED / "server_info.json").read_text())["path"]


@pytest.mark.parametrize(
    ("temperature", "truncates", "wanted"),
    [
        (1.0, False, {"raw_logprobs", "processed_logprobs"}),
        (1.0, True, {"raw_logprobs"}),
        (0.7, False, {"processed_logprobs"}),
    ],
)
def test_log_probs_of_another_distribution_are_refused(temperature: float, truncates: bool, wanted: set[str]) -> None:
    (_, models), (_, info) = recorded("models"), recorded("server_info")
    for mode in ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"):
        info["vllm_config"]["model_config"]["logprobs_mode"] = mode
        faults = VLLM.served([models, info], temperature, truncates).faults
        assert bool(faults) == (mode not in wanted)
        for fault in faults:
            assert f"--logprobs-mode {mode}; start it with --logprobs-mode " in fault
            assert any(one in fault.partition(";")[2] for one in wanted)


def sglang_answer(**meta: Any) -> dict[str, Any]:
    """As SGLang 0.5 writes it: two tokens behind a prompt of three."""
    routes = np.array([[[0, 1], [2, 3], [4, 5]]] * 4, np.int32)
    return {
        "text": "",
        "output_ids": [17, 4],
        "meta_info": {
            "id": "x",
            "finish_reason": {"type": "stop", "matched": 4},
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "weight_version": "6",
            "output_token_logprobs": [[-0.5, 17, None], [-1.25, 4, None]],
            "routed_experts": base64.b64encode(routes.tobytes()).decode(),
        }
        | meta,
    }


def sglang_ask(**changes: Any) -> Ask:
    params = SamplingParams(1.0, 0.9, 0, 5, frozenset({4}), "1/0", report_routes=True)
    return replace(Ask("train/7", 2, (1, 2, 3), 5, params), **changes)


def test_answers_of_sglang_are_read() -> None:
    answer = SGLANG.answer(sglang_ask(), sglang_answer())
    assert (answer.token_ids, answer.log_probs, answer.finish, answer.version) == ((17, 4), (-0.5, -1.25), "stop", 6)
    assert answer.routes is not None
    assert answer.routes.tolist() == [[[0, 1], [2, 3], [4, 5]]] * 4
    spans = [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 2}]
    with pytest.raises(BadAnswer, match="sampled it 6 and 7"):
        SGLANG.answer(sglang_ask(), sglang_answer(weight_versions=spans))
    aborted = sglang_answer(
        finish_reason={"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    )
    assert SGLANG.answer(sglang_ask(), aborted).finish == "abort"


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"output_token_logprobs": None}, "it has no log-probs for its 2 tokens"),
        ({"output_token_logprobs": [[-0.5, 17, None]]}, "it has 1 log-probs for 2 tokens"),
        ({"output_token_logprobs": [[-0.5, 17, None], [-1.0, 5, None]]}, "its log-probs are of the tokens"),
        ({"finish_reason": None}, "it has no finish_reason.type"),
        ({"weight_version": "default"}, "calls the weights that sampled it default"),
        ({"routed_experts": "AAAA"}, r"its routed_experts are no int32 \[\*, 3, 2\]"),
        ({"routed_experts": None}, "it has no routes of experts"),
    ],
)
def test_damaged_answers_of_sglang_are_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        SGLANG.answer(sglang_ask(), sglang_answer(**meta))


def test_what_sglang_is_sent() -> None:
    body = SGLANG.ask(sglang_ask()).body
    assert body is not None
    assert (body["input_ids"], body["return_logprob"], body["return_routed_experts"]) == ([1, 2, 3], True, True)
    sampling = body["sampling_params"]
    assert (sampling["top_k"], sampling["top_p"], sampling["stop_token_ids"]) == (-1, 0.9, [4])
    assert "ignore_eos" not in sampling
    (load,) = SGLANG.load_folder("/w/version-00000003", 3)
    assert load == Post(
        "/update_weights_from_disk",
        {"model_path": "/w/version-00000003", "weight_version": "3", "flush_cache": True},
        3,
    )


@pytest.mark.parametrize(("scaled_by", "faults"), [(0.5, 0), (1.0, 1)])
def test_sglang_that_gives_log_probs_of_another_temperature_is_refused(
    scaled_by: float, faults: int, tmp_path: Path
) -> None:
    logits = np.array([3.0, 2.0, 0.5, -1.0, 0.0])
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    info = {"model_path": str(tmp_path), "architectures": ["Qwen3MoeForCausalLM"]}

    def likeliest(temperature: float) -> dict[str, Any]:
        scaled = logits / temperature
        log_probs = scaled - np.log(np.exp(scaled).sum())
        return {"meta_info": {"output_top_logprobs": [[[value, token, None] for token, value in enumerate(log_probs)]]}}

    assert len(SGLANG.questions(1.0)) == 2
    assert len(SGLANG.questions(0.5)) == 4
    server = {"dtype": "float32", "context_length": 99, "enable_return_routed_experts": False}
    served = SGLANG.served([info, server, likeliest(1.0), likeliest(scaled_by)], 0.5, True)
    assert (served.keys["vocab_size"], served.dtype, served.positions, len(served.faults)) == (512, "fp32", 99, faults)
    assert all("SGLANG_RETURN_ORIGINAL_LOGPROB" in fault for fault in served.faults)
