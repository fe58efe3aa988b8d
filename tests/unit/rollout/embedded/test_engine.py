"""The engine in one process; other layouts are in tests/distributed/test_policy_layouts.py."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from gspo_moe.errors import Interrupted, RolloutError
from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.weights import RandomSource
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.rollout.embedded import engine
from gspo_moe.rollout.embedded.decoder import StepInput, StepOutput
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.rollout.stop_strings import StopStrings
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.types import Rollout
from tests.policy import (
    LONGEST,
    PROMPTS,
    SIZES,
    STOP,
    Letters,
    as_sample,
    packs_of,
    requests,
    sampling,
    score_and_record,
)
from tests.qwen3 import built, forward_logits, layout


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with built(SIZES, layout(), RandomSource(SIZES, seed=2)) as model:
        yield model


def generate(
    model: Model,
    asked: Sequence[Request],
    params: SamplingParams,
    max_batch: int = 64,
    prefill_tokens: int = 64,
) -> list[list[Rollout]]:
    engine = MegatronEngine(model, max_batch, prefill_tokens)
    engine.publish(model, 3)
    return engine.generate(asked, params)


def flat(groups: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def responses(groups: Sequence[Sequence[Rollout]]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(rollout.uid, rollout.sample_index): rollout.response_ids for rollout in flat(groups)}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.7, 0), (1.0, 1.0, 5)]
)
def test_log_probs_are_those_of_scoring(model: Model, temperature: float, top_p: float, top_k: int) -> None:
    rollouts = flat(generate(model, requests(), sampling(temperature, top_p=top_p, top_k=top_k)))
    packs = packs_of([as_sample(rollout) for rollout in rollouts], per_pack=6)
    for pack, log_probs_T in zip(packs, score(model, packs, temperature=temperature), strict=True):
        on_response = pack.response_mask_T.bool()
        assert log_probs_T[on_response].std() > 0.3
        torch.testing.assert_close(log_probs_T[on_response], pack.rollout_log_probs_T[on_response], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("max_batch", "prefill_tokens"), [(3, 8), (64, 64)])
def test_reported_routes_are_those_of_scoring(model: Model, max_batch: int, prefill_tokens: int) -> None:
    params = replace(sampling(), report_routes=True)
    rollouts = flat(generate(model, requests(), params, max_batch, prefill_tokens))
    packs = packs_of([replace(as_sample(rollout), routes=rollout.routes) for rollout in rollouts], per_pack=6)
    _, recordings = score_and_record(model, packs, RouteRecorder(model.chunks, SIZES, model.groups))
    for pack, recording in zip(packs, recordings, strict=True):
        assert pack.routes_TAK is not None
        assert pack.routes_TAK.dtype == recording.routes_TLK.dtype == torch.uint8
        assert torch.equal(*(routes.sort(dim=-1).values for routes in (pack.routes_TAK, recording.routes_TLK)))
    assert all(rollout.routes is None for rollout in flat(generate(model, requests(), sampling())))


def test_greedy_decoding_takes_the_likeliest_token_of_a_full_forward_each_time(model: Model) -> None:
    for rollout in flat(generate(model, requests(samples=1), sampling(temperature=0.0))):
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        ((logits,),) = forward_logits(model, [[ids]])
        behind = logits[len(rollout.prompt_ids) - 1 : -1]
        assert behind.argmax(dim=1).tolist() == list(rollout.response_ids)
        expected = torch.log_softmax(behind.double(), dim=1).amax(dim=1)
        torch.testing.assert_close(torch.tensor(rollout.log_probs).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("max_batch", "prefill_tokens"), [(1, 7), (3, 8), (6, 64), (20, 11)])
def test_rollouts_depend_neither_on_batching_nor_on_the_other_requests(
    model: Model, max_batch: int, prefill_tokens: int
) -> None:
    expected = generate(model, requests(), sampling())
    found = generate(model, requests()[::-1], sampling(), max_batch, prefill_tokens)[::-1]
    assert responses(found) == responses(expected)
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)
    alone = generate(model, requests()[1:2], sampling(), max_batch, prefill_tokens)
    assert responses(alone).items() <= responses(expected).items()


@pytest.mark.parametrize("max_batch", [3, 20])
def test_a_sample_is_told_of_once_it_ends_while_others_go_on(
    model: Model, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[int, int, Rollout]] = []  # behind so many steps
    steps = watch_steps(monkeypatch)
    params = replace(sampling(), report_routes=True)
    found = MegatronEngine(model, max_batch, prefill_tokens=64).generate(
        requests(), params, lambda number, rollout: ended.append((len(steps), number, rollout))
    )
    told = {(number, rollout.sample_index): rollout for _, number, rollout in ended}
    assert len(told) == len(ended)
    stopped = {(n, r.sample_index) for n, group in enumerate(found) for r in group if r.finish == "stop"}
    assert stopped <= told.keys()
    assert (max_batch == 20) == (stopped == told.keys()), "the length limit ends earlier batches before others begin"
    for (number, index), rollout in told.items():
        assert rollout == replace(found[number][index], routes=None)
    if max_batch == 20:
        assert [step for step, _, _ in ended] == [len(rollout.response_ids) - 1 for _, _, rollout in ended]


def test_more_samples_go_on_where_fewer_stopped(model: Model) -> None:
    three, six = (responses(generate(model, requests(samples), sampling())) for samples in (3, 6))
    assert three.items() <= six.items()
    assert len(six) == 2 * len(three)


def test_samples_of_a_prompt_differ_and_so_do_seeds(model: Model) -> None:
    groups = generate(model, requests(samples=8), sampling())
    for request, group in zip(requests(), groups, strict=True):
        assert len({rollout.response_ids for rollout in group}) >= 7
        assert [rollout.sample_index for rollout in group] == list(range(8))
        assert {(r.uid, r.prompt_ids, r.versions) for r in group} == {
            (request.uid, request.prompt_ids, ((3, length),)) for length in {len(r.log_probs) for r in group}
        }
    again, other = (generate(model, requests(samples=8), sampling(seed=seed)) for seed in ("1/0", "1/1"))
    assert again == groups
    assert sum(a != b for a, b in zip(flat(other), flat(groups), strict=True)) > 35


def test_a_response_ends_with_its_first_stop_token_or_at_the_length_limit(model: Model) -> None:
    rollouts = flat(generate(model, requests(samples=8), sampling()))
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        *before, last = rollout.response_ids
        assert not STOP & set(before)
        assert (rollout.finish == "stop") == (last in STOP)
        assert rollout.finish == "stop" or len(rollout.response_ids) == LONGEST
        assert len(rollout.log_probs) == len(rollout.response_ids)


def test_a_response_ends_where_its_text_first_holds_a_stop_string(model: Model) -> None:
    tokenizer: Any = Letters()
    free = sampling(stop_ids=frozenset())
    whole = [tokenizer.decode(rollout.response_ids) for rollout in flat(generate(model, requests(samples=8), free))]
    # Of the answers' own text: inside of two of them, and one that is the beginning of another.
    strings = (whole[0][3:6], whole[1][5:7], whole[2][2:4], whole[2][2:5])
    params = replace(free, stop_strings=StopStrings(strings, tokenizer))
    rollouts = flat(generate(model, requests(samples=8), params))
    for rollout, text in zip(rollouts, whole, strict=True):
        ends = [text.find(one) + len(one) for one in strings if one in text]
        assert rollout.finish == ("stop" if ends else "length")
        assert tokenizer.decode(rollout.response_ids) == text[: min(ends, default=LONGEST)]
        assert len(rollout.log_probs) == len(rollout.response_ids)
    assert [len(rollout.response_ids) for rollout in rollouts[:3]] == [6, 7, 4]


def test_one_token_is_a_whole_response(model: Model) -> None:
    every = frozenset(range(SIZES.vocab_size))
    for params in (sampling(stop_ids=every), sampling(longest=1, stop_ids=frozenset())):
        rollouts = flat(generate(model, requests(), params))
        assert {len(rollout.response_ids) for rollout in rollouts} == {1}
        assert {rollout.finish for rollout in rollouts} == {"stop" if params.stop_ids else "length"}


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[StepInput]:
    """The decode steps from now on."""
    steps: list[StepInput] = []
    forward_over = MegatronEngine._forward

    def watched(engine: MegatronEngine, cache: KVCache) -> Callable[[StepInput], StepOutput]:
        forward = forward_over(engine, cache)

        def watching(step: StepInput) -> StepOutput:
            steps.append(replace(step, positions_N=step.positions_N.clone()))
            return forward(step)

        return watching

    monkeypatch.setattr(MegatronEngine, "_forward", watched)
    return steps


@pytest.mark.parametrize("max_batch", [4, 64])
def test_every_token_is_fed_once_and_finished_sequences_leave(
    model: Model, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []

    def counting(model: Model, inputs: Sequence[Any], *rest: Any, **more: Any) -> Any:
        fed.extend(item.num_tokens for item in inputs)
        return forward(model, inputs, *rest, **more)

    forward = engine.run
    monkeypatch.setattr(engine, "run", counting)
    steps = watch_steps(monkeypatch)
    rollouts = flat(generate(model, requests(), sampling(), max_batch, prefill_tokens=8))
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 3
    assert sum(fed) == sum(map(len, PROMPTS))
    # A response's last token is never fed: nothing follows it.
    assert sum(len(step.ids_N) for step in steps) == sum(len(rollout.response_ids) - 1 for rollout in rollouts)


def test_each_step_feeds_the_newest_tokens_of_the_unfinished_at_their_positions(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watch_steps(monkeypatch)
    rollouts = flat(generate(model, requests(), sampling()))
    assert len({len(step.ids_N) for step in steps}) > 3
    for number, step in enumerate(steps):
        going_on = [one for one in rollouts if len(one.response_ids) > number + 1]
        expected = sorted((one.response_ids[number], len(one.prompt_ids) + number) for one in going_on)
        assert sorted(zip(step.ids_N.tolist(), step.positions_N.tolist(), strict=True)) == expected
        assert step.used >= max(position for _, position in expected) + 1


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"stop_ids": frozenset()}])
def test_looking_for_ends_now_and_then_changes_no_rollout(
    model: Model, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = replace(sampling(**options), report_routes=True)
    expected = flat(generate(model, requests(), params))
    steps = watch_steps(monkeypatch)
    monkeypatch.setitem(engine.ENDS_INTERVAL, "cpu", 5)
    found = flat(generate(model, requests(), params))
    lengths = [len(step.ids_N) for step in steps]
    assert len(set(lengths[:4])) == len(set(lengths[4:9])) == 1
    assert [replace(one, log_probs=(), routes=None) for one in found] == [
        replace(one, log_probs=(), routes=None) for one in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)
        assert one.routes is not None
        assert other.routes is not None
        assert torch.equal(one.routes.sort(dim=-1).values, other.routes.sort(dim=-1).values)


def test_no_requests_give_no_rollouts(model: Model) -> None:
    assert generate(model, [], sampling()) == []


@pytest.mark.parametrize(
    ("prompt", "longest", "fix"),
    [
        ((), 4, "prompt train/0 is empty; give at least one token"),
        ((1,) * 120, 9, "120 tokens and rollout.max_response_tokens is 9, more than the model's 128 positions; lower"),
        ((1,) * 65, 4, "65 tokens, more than schedule.micro_batch_tokens=64; raise it"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_with_the_fix(
    model: Model, prompt: tuple[int, ...], longest: int, fix: str
) -> None:
    with pytest.raises(RolloutError) as caught:
        generate(model, requests(prompts=[prompt]), sampling(longest=longest))
    assert fix in str(caught.value)


def test_a_response_may_fill_the_models_last_position(model: Model) -> None:
    last = SIZES.max_position_embeddings
    (group,) = generate(model, requests(1, [(1,) * (last - 9)]), sampling(longest=9, stop_ids=frozenset()), 64, last)
    assert len(group[0].response_ids) == 9


def test_broken_weights_are_no_rollouts(model: Model) -> None:
    weight = model.gpt_chunks[0].output_layer.weight
    kept = weight[4, 4].item()
    try:
        with torch.no_grad():
            weight[4, 4] = float("nan")
        with pytest.raises(RolloutError, match="logits are not finite"):
            generate(model, requests(), sampling())
    finally:
        with torch.no_grad():
            weight[4, 4] = kept


def test_a_signal_ends_a_generation_before_its_next_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run_batch = list[int](), MegatronEngine._run_batch

    def is_signalled(engine: MegatronEngine, batch: list[Any], *rest: Any) -> Any:
        ran.append(len(batch))
        signal.raise_signal(signal.SIGUSR1)
        return run_batch(engine, batch, *rest)

    monkeypatch.setattr(MegatronEngine, "_run_batch", is_signalled)
    with StopSignals() as stop, pytest.raises(Interrupted, match="ended by SIGUSR1"):
        MegatronEngine(model, 2, 64, stop).generate(requests(2, PROMPTS), sampling())
    assert ran == [1]
