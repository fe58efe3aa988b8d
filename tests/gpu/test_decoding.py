"""Decoding in CUDA graphs, and flash attention within packs, against the same without."""

from dataclasses import replace

import pytest
import torch

from gspo_moe.model import torch_attention
from gspo_moe.model.build import build_model
from gspo_moe.model.weights import load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.platform import device
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.graphs import GraphPool, graph_obstacle
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.types import Rollout
from tests.gpu.golden import PROMPTS, SIZES, settings, weights
from tests.launch import launch
from tests.qwen3 import Tensors, forward_logits, layout, random_sequences


def check_graphs() -> None:
    groups = initialize(layout(), seed=1)
    model = build_model(settings("bf16", "local"), SIZES, groups)
    load_weights(model, Tensors(weights()))
    assert graph_obstacle(model) is None
    replays: list[object] = []
    run = GraphPool.run

    def counting(pool: GraphPool, shape: object, step: object) -> object:
        replays.append(shape)
        return run(pool, shape, step)  # type: ignore[arg-type]

    GraphPool.run = counting  # type: ignore[assignment, method-assign]
    requests = [Request(str(number), ids, samples=3) for number, ids in enumerate(PROMPTS)]
    params = SamplingParams(1.0, 1.0, 0, 90, frozenset({0}), seed="1", report_routes=True)

    def generated(cuda_graph: str) -> list[Rollout]:
        engine = MegatronEngine(model, max_batch=8, prefill_tokens=64, cuda_graph=cuda_graph)
        return [rollout for group in engine.generate(requests, params) for rollout in group]

    expected = generated("off")
    assert not replays
    for _ in range(2):  # the second time in memory that the first one's graphs have left
        found = generated("auto")
        assert len(set(replays)) > 2
        assert len(replays) > 2 * len(set(replays)), "a graph is captured once and replayed"
        assert [replace(one, routes=None) for one in found] == [replace(one, routes=None) for one in expected]
        assert all(torch.equal(a.routes, b.routes) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.gpt_chunks[0].parameters():
            parameter.mul_(1.25)  # as an update changes them: where they lie
    assert [one.response_ids for one in generated("auto")] == [one.response_ids for one in generated("off")]
    shut_down()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs grouped products"
)
def test_generation_with_graphs_equals_generation_without() -> None:
    launch(check_graphs, 1)


def check_flash_attention() -> None:
    groups = initialize(layout(), seed=1)
    model = build_model(settings("bf16", "local"), SIZES, groups)
    load_weights(model, Tensors(weights()))
    packs = [[ids.to(device().torch_device) for ids in random_sequences(SIZES, (40, 1, 17, 70), seed=3)]]
    suits, used = torch_attention.suits_varlen, []

    def watched(query_THD: torch.Tensor) -> bool:
        used.append(suits(query_THD))
        return used[-1]

    torch_attention.suits_varlen = watched
    with device().torch_device:
        (flash,) = forward_logits(model, packs)
        torch_attention.suits_varlen = lambda query_THD: False
        (grid,) = forward_logits(model, packs)
    assert used
    assert all(used)
    for one, other in zip(flash, grid, strict=True):
        assert (one.float() - other.float()).abs().mean() < 0.02
    shut_down()


def test_flash_attention_within_packs_is_the_grids() -> None:
    launch(check_flash_attention, 1)
