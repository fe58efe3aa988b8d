"""Decode steps by kernels, by PyTorch's operators and by the training forward: the same tokens, log-probs, routes.

Other layouts are in tests/distributed/test_policy_layouts.py, whose engines take the lean steps.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_moe.config.rope import Yarn
from gspo_moe.config.schema import Config
from gspo_moe.kernels.library import kernels
from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.weights import RandomSource
from gspo_moe.rollout.embedded import engine, lean
from gspo_moe.rollout.embedded.arithmetic import Kernels, Operators, arithmetic_for
from gspo_moe.rollout.embedded.decoder import StepInput
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.lean import LeanForward, lean_obstacle
from gspo_moe.rollout.embedded.samples import Samples
from gspo_moe.types import Rollout
from tests.policy import requests, sampling
from tests.qwen3 import architecture, built, layout

YARN = Yarn(factor=4.0, original_max_position_embeddings=8)
MODELS = {
    "plain": architecture(initializer_range=0.25),
    # Sizes that fill no vector, one query head a key head, gate weights from before top-k.
    "odd": architecture(
        initializer_range=0.25,
        hidden_size=30,
        head_dim=6,
        num_key_value_heads=4,
        moe_intermediate_size=13,
        num_experts=5,
        norm_topk_prob=False,
        rope_scaling=YARN,
    ),
    "tied": architecture(initializer_range=0.25, tie_word_embeddings=True, num_key_value_heads=1),
}


def generated(model: Model, way: str, monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    with monkeypatch.context() as patch:
        if way == "whole":
            patch.setattr(engine, "lean_obstacle", lambda _: "the test's")
        else:
            chosen = Kernels if way == "kernels" else Operators
            patch.setattr(lean, "arithmetic_for", lambda _, epsilon: chosen(epsilon))
        params = replace(sampling(longest=20), report_routes=True)
        groups = MegatronEngine(model, max_batch=9, prefill_tokens=64).generate(requests(), params)
    return [rollout for group in groups for rollout in group]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp32") for name in MODELS), ("plain", "bf16")])
def test_all_ways_give_the_same_rollouts(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, config = MODELS[name], Config.model_validate({"model": {"preset": "tiny", "dtype": dtype}})
    ways = ["kernels", "operators"] if dtype == "fp32" and kernels().cpu is not None else ["operators"]
    with built(sizes, layout(), RandomSource(sizes, seed=2), config) as model:
        expected = generated(model, "whole", monkeypatch)
        assert len({len(one.response_ids) for one in expected}) > 3
        for way in ways:
            found = generated(model, way, monkeypatch)
            assert [one.response_ids for one in found] == [one.response_ids for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)
                assert one.routes is not None
                assert other.routes is not None
                assert torch.equal(one.routes.sort(dim=-1).values, other.routes.sort(dim=-1).values)


@pytest.mark.parametrize(("dtype", "way"), [("fp32", Kernels), ("fp32", Operators), ("bf16", Operators)])
def test_a_rank_without_tokens_steps_along(dtype: str, way: type, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, config = MODELS["plain"], Config.model_validate({"model": {"preset": "tiny", "dtype": dtype}})
    if way is Kernels and kernels().cpu is None:
        pytest.skip("no kernels are built")
    monkeypatch.setattr(lean, "arithmetic_for", lambda _, epsilon: way(epsilon))
    none = Samples([], sampling(), torch.device("cpu"))
    with built(sizes, layout(), RandomSource(sizes, seed=2), config) as model:
        forward = LeanForward(model, KVCache(1, 16), records=True)
        found = forward(StepInput(torch.zeros(0, dtype=torch.int64), none.positions_N, used=1, most=3))
    assert found.logits_NV is not None
    assert found.routes_NLK is not None
    assert found.logits_NV.shape == (0, sizes.vocab_size)
    assert found.routes_NLK.shape == (0, sizes.num_hidden_layers, sizes.num_experts_per_tok)


@pytest.mark.skipif(kernels().cpu is None, reason="no kernels are built")
@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, Kernels), (torch.bfloat16, Operators)])
def test_kernels_are_for_float32(dtype: torch.dtype, chosen: type) -> None:
    assert type(arithmetic_for(torch.zeros(1, dtype=dtype), 1e-6)) is chosen


def test_experts_of_another_backend_run_in_the_training_forward() -> None:
    layer: Any = SimpleNamespace(mlp=SimpleNamespace(experts=torch.nn.Identity()))
    model: Any = SimpleNamespace(gpt_chunks=[SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))])
    obstacle = lean_obstacle(model)
    assert obstacle is not None
    assert "model.backend.experts" in obstacle
