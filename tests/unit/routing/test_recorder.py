"""The recorder in one process; other layouts are in tests/distributed/test_policy_layouts.py."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.rollout.score import score
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.training.step import train_minibatch
from gspo_moe.types import Microbatch, TrainingSample
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import architecture, layout, random_sequences

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
        score(model, packs(sizes), recorder=recorder)
        routes = recorder.take()
    assert recorder.layers == (0, 1)
    assert max(int(pack.max()) for pack in routes) == num_experts - 1
    for number, (found, pack) in enumerate(zip(routes, packs(sizes), strict=True)):
        assert found.dtype == dtype
        assert found.shape == (pack.num_tokens, 2, topk)
        assert torch.equal(in_order(found), watch.routes(number))


def test_nothing_is_recorded_outside_a_scope(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    score(model, packs(SIZES))
    assert recorder.take() == []
    score(model, packs(SIZES), recorder=recorder)
    expected = recorder.take()
    score(model, packs(SIZES), recorder=recorder)
    score(model, packs(SIZES)[::-1])
    found = recorder.take()
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.take() == []


def test_packs_come_in_the_order_of_their_index_whenever_they_ran(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    first, second, third = packs(SIZES)
    score(model, [first, second, third], recorder=recorder)
    expected = recorder.take()

    def run(pack: Microbatch, index: int) -> None:
        with recorder.scope(index, model.chunks[0], ContextSplit(pack.cu_seqlens)):
            score(model, [pack])

    run(third, 2)
    run(first, 0)
    run(second, 1)
    assert all(torch.equal(a, b) for a, b in zip(recorder.take(), expected, strict=True))


def test_a_pass_that_fails_leaves_recording_off(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    with pytest.raises(ZeroDivisionError), recorder.scope(0, model.chunks[0], ContextSplit(torch.tensor([0, 3]))):
        raise ZeroDivisionError
    score(model, packs(SIZES))
    assert recorder.take() == []


def test_a_closed_recorder_lets_go_of_the_model(model: Model) -> None:
    routers = [layer.mlp.router for layer in model.gpt_chunks[0].decoder.layers]
    closed, still_open = (RouteRecorder(model.chunks, SIZES, model.groups) for _ in range(2))
    closed.close()
    assert [len(router._forward_hooks) for router in routers] == [1, 1]
    score(model, packs(SIZES), recorder=still_open)
    assert len(still_open.take()) == 3


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
        leftover = recorder.take()
    # Each pack's forward is followed by its own recomputation.
    assert [len(calls) for calls in watch.calls] == [6, 6]
    assert leftover == []
    assert len(result.routes) == 3
    for number, routes in enumerate(result.routes):
        assert torch.equal(in_order(routes), watch.routes(2 * number))


def test_overlap_counts_shared_experts_in_every_layer(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    old = torch.tensor([[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[0, 7], [1, 2]]], dtype=torch.uint8)
    new = torch.tensor([[[1, 0], [5, 6]], [[4, 5], [7, 6]], [[7, 3], [2, 1]]], dtype=torch.uint8)
    assert recorder.overlap(old, new).tolist() == [[2, 1], [0, 2], [1, 2]]
    assert torch.equal(recorder.gather_layers(old), old)
