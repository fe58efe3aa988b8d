"""Decode steps in buckets, and in memory that stays where it is as under a CUDA graph, against plain ones."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.weights import RandomSource
from gspo_moe.rollout.embedded.decoder import Decoder, StepInput, StepOutput, bucket
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.types import Rollout
from tests.policy import SIZES, requests, sampling
from tests.qwen3 import built, layout

Forward = Callable[[StepInput], StepOutput]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with built(SIZES, layout(), RandomSource(SIZES, seed=2)) as model:
        yield model


@pytest.mark.parametrize(
    ("count", "most", "least", "expected"),
    [
        *[(count, 100, 1, size) for count, size in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (6, 6), (7, 8), (9, 12)]],
        (17, 20, 1, 20),
        (65, 100, 1, 96),
        (97, 100, 1, 100),
        (3, 1000, 64, 64),
        (65, 1000, 64, 96),
        (3, 48, 64, 48),
    ],
)
def test_buckets_are_powers_of_two_and_three_quarters_of_them(count: int, most: int, least: int, expected: int) -> None:
    assert bucket(count, most, least) == expected


class Replays:
    """Stands for a pool of CUDA graphs: every step of a shape fills the output of the first one."""

    def __init__(self) -> None:
        self.outputs: dict[Hashable, StepOutput] = {}

    def run(self, shape: Hashable, step: Callable[[], StepOutput]) -> StepOutput:
        if shape not in self.outputs:
            step()  # the warm-up, which must leave no trace
            self.outputs[shape] = step()
            return self.outputs[shape]
        kept, found = self.outputs[shape], step()
        for place, value in ((kept.logits_NV, found.logits_NV), (kept.routes_NLK, found.routes_NLK)):
            assert (place is None) == (value is None)
            if place is not None and value is not None:
                place.copy_(value)
        return kept


def generated(
    model: Model, monkeypatch: pytest.MonkeyPatch, make: Callable[[Forward, KVCache], Decoder]
) -> list[Rollout]:
    monkeypatch.setattr(MegatronEngine, "_decoder", lambda engine, cache: make(engine._forward(cache), cache))
    params = replace(sampling(longest=40), report_routes=True)
    engine = MegatronEngine(model, max_batch=14, prefill_tokens=64)
    return [rollout for group in engine.generate(requests(), params) for rollout in group]


@pytest.mark.parametrize("replays", [False, True])
def test_generation_in_buckets_equals_generation_without(
    model: Model, monkeypatch: pytest.MonkeyPatch, replays: bool
) -> None:
    here = torch.device("cpu")
    expected = generated(model, monkeypatch, lambda forward, cache: Decoder(forward, cache, here))
    fed: dict[tuple[int, int], set[int]] = {}
    pools: list[Replays] = []

    def make(forward: Forward, cache: KVCache) -> Decoder:
        pools.append(Replays())
        fed.clear()

        def watched(step: StepInput) -> StepOutput:
            places = fed.setdefault((len(step.ids_N), step.used), set())
            places.add(hash((step.ids_N.data_ptr(), step.positions_N.data_ptr())))
            return forward(step)

        pool: Any = pools[-1] if replays else None
        return Decoder(watched, cache, here, buckets=True, graphs=pool)

    found = generated(model, monkeypatch, make)
    assert len(pools) == 2
    assert len(fed) > 2
    assert all(bucket(size, 14) == size for size, _ in fed)
    assert all(len(places) == 1 for places in fed.values()), "a graph reads the same memory at each replay"
    assert not replays or pools[-1].outputs.keys() == fed.keys()
    assert [rollout.response_ids for rollout in found] == [rollout.response_ids for rollout in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)
        assert one.routes is not None
        assert other.routes is not None
        assert torch.equal(one.routes.sort(dim=-1).values, other.routes.sort(dim=-1).values)


def test_ranks_with_fewer_tokens_exchange_as_many_rows_as_the_fullest() -> None:
    fed: dict[bool, list[tuple[int, int]]] = {False: [], True: []}

    for buckets, steps in fed.items():

        def forward(step: StepInput, steps: list[tuple[int, int]] = steps) -> StepOutput:
            steps.append((len(step.ids_N), step.most))
            return StepOutput(None, None)

        for count in (0, 3, 5):
            ids, positions = torch.zeros(2, count, dtype=torch.int64)
            step = StepInput(ids, positions, used=1, most=5)
            Decoder(forward, KVCache(8, 16), torch.device("cpu"), buckets=buckets).step(step)
    assert fed == {False: [(0, 5), (3, 5), (5, 5)], True: [(0, 6), (3, 6), (6, 6)]}
