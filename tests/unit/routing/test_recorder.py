"""The recorder in one process; other layouts are in tests/distributed/test_policy_layouts.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.routing.comparison import compare
from gspo_moe.routing.recorder import Recording, RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.types import Microbatch, TrainingSample
from tests.policy import SIZES, packs_of, score_and_record, trained
from tests.qwen3 import architecture, layout, random_sequences
from tests.steps import train_minibatch

# Three packs of other lengths, one of a single token.
LENGTHS = (9, 4, 13, 6, 2)


def packs(sizes: Architecture) -> list[Microbatch]:
    sequences = random_sequences(sizes, LENGTHS, seed=7)
    samples = [TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1)) for ids in sequences]
    return packs_of(samples, per_pack=2)


class Watch:
    """What each router was given, in order of calls, and the experts that float64 logits would pick from it."""

    def __init__(self, model: Model) -> None:
        self.calls: list[list[torch.Tensor]] = [[] for _ in range(model.architecture.num_hidden_layers)]
        self._topk = model.architecture.num_experts_per_tok
        for layer in model.gpt_chunks[0].decoder.layers:
            layer.mlp.router.register_forward_pre_hook(self._keep(layer.layer_number - 1))

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            logits = inputs[0].detach().double().flatten(0, 1) @ router.weight.detach().double().T
            self.calls[layer].append(logits.topk(self._topk, dim=1).indices.sort(dim=1).values)

        return keep

    def routes(self, pack: int) -> torch.Tensor:
        return torch.stack([calls[pack] for calls in self.calls], dim=1)


def same_routes(found: Sequence[Recording], expected: Sequence[Recording]) -> bool:
    return all(torch.equal(a.routes_TLK, b.routes_TLK) for a, b in zip(found, expected, strict=True))


def in_order(routes: torch.Tensor) -> torch.Tensor:
    return routes.long().sort(dim=-1).values


@pytest.fixture
def model() -> Iterator[Model]:
    with trained(Config(), layout()) as (model, _):
        yield model


# 255 is the largest id that a byte holds.
@pytest.mark.parametrize(
    ("num_experts", "topk", "dtype"), [(8, 2, torch.uint8), (256, 40, torch.uint8), (320, 40, torch.int16)]
)
def test_routes_are_the_k_largest_logits_of_each_router(num_experts: int, topk: int, dtype: torch.dtype) -> None:
    sizes = architecture(num_experts=num_experts, num_experts_per_tok=topk, moe_intermediate_size=4)
    with trained(Config(), layout(), sizes) as (model, _):
        watch, recorder = Watch(model), RouteRecorder(model.chunks, sizes, model.groups)
        routes = [recording.routes_TLK for recording in score_and_record(model, packs(sizes), recorder)[1]]
    assert recorder.layers.indices == (0, 1)
    assert max(int(pack.max()) for pack in routes) == num_experts - 1
    for number, (found, pack) in enumerate(zip(routes, packs(sizes), strict=True)):
        assert found.dtype == dtype
        assert found.shape == (pack.num_tokens, 2, topk)
        assert torch.equal(in_order(found), watch.routes(number))


def test_nothing_is_recorded_outside_a_scope(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    record = recorder.start()
    score(model, packs(SIZES))
    assert record.recordings() == []
    _, expected = score_and_record(model, packs(SIZES), recorder)
    score(model, packs(SIZES), record=record)
    score(model, packs(SIZES)[::-1])
    assert same_routes(record.recordings(), expected)
    assert recorder.start().recordings() == []


def test_passes_that_take_turns_keep_their_packs_apart(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    _, expected = score_and_record(model, packs(SIZES), recorder)
    passes = recorder.start(), recorder.start()
    for index in range(3):
        for record, pack in zip(passes, (packs(SIZES)[index], packs(SIZES)[2 - index]), strict=True):
            with record.scope(index, model.chunks[0], ContextSplit(pack.cu_seqlens)):
                score(model, [pack])
    forward, backward = (record.recordings() for record in passes)
    assert same_routes(forward, expected)
    assert same_routes(backward, expected[::-1])


def test_packs_come_in_the_order_of_their_index_whenever_they_ran(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    first, second, third = packs(SIZES)
    _, expected = score_and_record(model, [first, second, third], recorder)
    record = recorder.start()

    def run(pack: Microbatch, index: int) -> None:
        with record.scope(index, model.chunks[0], ContextSplit(pack.cu_seqlens)):
            score(model, [pack])

    run(third, 2)
    run(first, 0)
    run(second, 1)
    assert same_routes(record.recordings(), expected)


def test_a_pass_that_fails_leaves_recording_off(model: Model) -> None:
    record = RouteRecorder(model.chunks, SIZES, model.groups).start()
    with pytest.raises(ZeroDivisionError), record.scope(0, model.chunks[0], ContextSplit(torch.tensor([0, 3]))):
        raise ZeroDivisionError
    score(model, packs(SIZES))
    assert record.recordings() == []


def test_a_pass_lets_go_of_the_routers_and_of_nobody_else_there(model: Model) -> None:
    routers = [layer.mlp.router for layer in model.gpt_chunks[0].decoder.layers]
    heard: list[int] = []
    for router in routers:
        router.observers += (lambda router, *_: heard.append(router.layer_number),)
    others = [router.observers for router in routers]
    score_and_record(model, packs(SIZES), RouteRecorder(model.chunks, SIZES, model.groups))
    assert [router.observers for router in routers] == others
    assert heard == [1, 2] * 3


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_routes_again_but_is_not_recorded_again(recompute: str) -> None:
    config = Config.model_validate({"parallel": {"recompute": recompute}})
    with trained(config, layout()) as (model, optimizer):
        watch, recorder = Watch(model), RouteRecorder(model.chunks, SIZES, model.groups)
        old = score(model, packs(SIZES))
        for calls in watch.calls:
            calls.clear()
        result = train_minibatch(
            model, optimizer, packs(SIZES), old, config.algorithm, len(LENGTHS), temperature=1.0, recorder=recorder
        )
    # Each pack's forward is followed by its own recomputation.
    assert [len(calls) for calls in watch.calls] == [6, 6]
    assert len(result.routes) == 3
    for number, recording in enumerate(result.routes):
        assert torch.equal(in_order(recording.routes_TLK), watch.routes(2 * number))


@pytest.mark.parametrize(("num_experts", "topk"), [(8, 2), (320, 40), (8, 8)])
def test_scores_are_those_of_the_softmax_over_all_experts(num_experts: int, topk: int) -> None:
    sizes = architecture(num_experts=num_experts, num_experts_per_tok=topk, moe_intermediate_size=4)
    with trained(Config(), layout(), sizes) as (model, _):
        logits: list[torch.Tensor] = []
        for layer in model.gpt_chunks[0].decoder.layers:
            layer.mlp.router.observers += (lambda _, logits_PE, __: logits.append(logits_PE.double()),)
        recorder = RouteRecorder(model.chunks, sizes, model.groups, scores=True)
        _, own = score_and_record(model, packs(sizes), recorder)
        reference = [recording.routes_TLK.flip(0) for recording in own]
        _, other = score_and_record(model, packs(sizes), recorder, reference)
    for number, recording in enumerate(own):
        assert recording.own is not None
        assert recording.reference_log_probs_TLK is None
        against = other[number].reference_log_probs_TLK
        assert against is not None
        assert other[number].own is None
        for layer in range(2):
            log_probs = torch.log_softmax(logits[2 * number + layer], dim=1)
            best = torch.cat(
                [log_probs.exp().sort(dim=1, descending=True).values, torch.zeros(len(log_probs), 1)], dim=1
            )
            for found, expected in (
                (recording.own.margin_TL[:, layer], best[:, topk - 1] - best[:, topk]),
                (recording.own.log_probs_TLK[:, layer], log_probs.gather(1, recording.routes_TLK[:, layer].long())),
                (against[:, layer], log_probs.gather(1, reference[number][:, layer].long())),
            ):
                torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_a_pair_of_the_same_pass_has_not_moved(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups, scores=True)
    _, old = score_and_record(model, packs(SIZES), recorder)
    _, new = score_and_record(model, packs(SIZES), recorder, [recording.routes_TLK for recording in old])
    for pack, before, after in zip(packs(SIZES), old, new, strict=True):
        metrics = compare(pack, before, after, recorder.layers).to_metrics()
        if pack.route_mask_T.any():
            assert metrics["any_layer_flip"] == metrics["response_set_change"] == 0
            assert metrics["router_shift"] == 1
        else:
            assert metrics == {}
