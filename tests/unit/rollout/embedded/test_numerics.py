"""Rollouts with another arithmetic than the trainer's; other layouts: tests/distributed/test_numerics_layouts.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.config.loading import load_config
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.weights import RandomSource
from gspo_moe.platform import Backend, Backends
from gspo_moe.rollout.embedded import engine
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.lean import LeanForward
from gspo_moe.rollout.embedded.numerics import RoundedCopy, check_numerics, rounded_copy
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.types import Rollout
from tests.policy import SIZES, as_sample, packs_of, requests, sampling, score_and_record
from tests.qwen3 import built, layout
from tests.unit.rollout.embedded.test_fp8 import expected_of_blocks

NUMERICS = ("bf16", "fp8_rounded")
# Their last words name the layers that engines run in FP8.
LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def configured(numerics: str) -> Config:
    return Config.model_validate({"model": {"preset": "tiny"}, "rollout": {"numerics": numerics}})


@contextlib.contextmanager
def copied(numerics: str) -> Iterator[tuple[Model, RoundedCopy]]:
    with built(SIZES, layout(), RandomSource(SIZES, seed=2)) as model:
        copy = rounded_copy(configured(numerics), model)
        assert copy is not None
        yield model, copy


def generated(model: Model, copy: RoundedCopy | None) -> list[Rollout]:
    params = replace(sampling(), report_routes=True)
    groups = MegatronEngine(model, 64, 64, rounded=copy).generate(requests(samples=12), params)
    return [rollout for group in groups for rollout in group]


def mismatch(model: Model, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """The k3 estimate of SPEC section 3, and the share of layers' choices that differ, from what this model finds."""
    packs = packs_of([replace(as_sample(rollout), routes=rollout.routes) for rollout in rollouts], per_pack=6)
    scored, recorded = score_and_record(model, packs, RouteRecorder(model.chunks, SIZES, model.groups))
    differences, flips = [], []
    for pack, log_probs_T, recording in zip(packs, scored, recorded, strict=True):
        assert pack.routes_TAK is not None
        differences.append((log_probs_T - pack.rollout_log_probs_T)[pack.response_mask_T.bool()].double())
        ours, theirs = (routes.sort(dim=-1).values for routes in (recording.routes_TLK, pack.routes_TAK))
        flips.append((ours != theirs).any(-1).flatten())
    d = torch.cat(differences)
    return float((d.exp() - 1 - d).mean()), float(torch.cat(flips).double().mean())


def test_rollouts_come_from_the_policy_itself_by_default() -> None:
    with built(SIZES, layout(), RandomSource(SIZES, seed=2)) as model:
        assert rounded_copy(configured("trainer"), model) is None
        k3, flips = mismatch(model, generated(model, None))
    assert k3 < 1e-9
    assert flips == 0


def test_rollouts_differ_from_the_trainer_as_much_as_their_numerics_do_and_hardly_from_themselves() -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for numerics in NUMERICS:
        with copied(numerics) as (model, copy):
            rollouts = generated(model, copy)
            found[numerics] = [mismatch(model, rollouts), mismatch(copy.model, rollouts)]
    (bf16, bf16_itself), (fp8, fp8_itself) = found["bf16"], found["fp8_rounded"]
    for trainer, itself in zip(bf16, bf16_itself, strict=True):
        assert itself < trainer / 3
    for trainer, itself in zip(fp8, fp8_itself, strict=True):
        assert itself < trainer / 30
    assert fp8[0] > 5 * bf16[0] > 0
    assert fp8[1] > 5 * bf16[1] > 0


@pytest.mark.parametrize("numerics", NUMERICS)
def test_the_copys_weights_are_the_policys_rounded_when_published(numerics: str) -> None:
    with copied(numerics) as (model, copy):
        engine = MegatronEngine(model, 64, 64, rounded=copy)
        first = generated(model, copy)
        with torch.no_grad():
            for weight in model.gpt_chunks[0].parameters():
                weight.mul_(1.25)
        assert [one.log_probs for one in generated(model, copy)] == [one.log_probs for one in first]
        engine.publish(model, 1)
        assert [one.log_probs for one in generated(model, copy)] != [one.log_probs for one in first]
        ours = dict(copy.model.gpt_chunks[0].named_parameters())
        for name, weight in model.gpt_chunks[0].named_parameters():
            matrices = weight.detach().flatten(0, -3) if weight.dim() > 2 else weight.detach()[None]
            if numerics == "fp8_rounded" and name.endswith(LINEAR):
                rounded = np.stack([expected_of_blocks(each.double().numpy(), 128, 128) for each in matrices])
                assert np.array_equal(ours[name].double().numpy(), rounded.reshape(weight.shape)), name
            else:
                assert torch.equal(ours[name], weight.bfloat16()), name


def test_the_policys_own_forward_stays_as_it_is() -> None:
    with built(SIZES, layout(), RandomSource(SIZES, seed=2)) as model:
        packs = packs_of([as_sample(rollout) for rollout in generated(model, None)], per_pack=6)
        before = score(model, packs)
        copy = rounded_copy(configured("fp8_rounded"), model)
        generated(model, copy)
        assert all(torch.equal(*each) for each in zip(score(model, packs), before, strict=True))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_decode_steps_are_the_copys_training_forward(numerics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with copied(numerics) as (model, copy):
        lean = generated(model, copy)
        monkeypatch.setattr(engine, "lean_obstacle", lambda _: "the test's")
        whole = generated(model, copy)
    assert [one.response_ids for one in lean] == [one.response_ids for one in whole]
    for one, other in zip(lean, whole, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)
        assert one.routes is not None
        assert other.routes is not None
        assert torch.equal(one.routes.sort(dim=-1).values, other.routes.sort(dim=-1).values)


def test_linear_layers_multiply_rounded_values_by_rounded_weights() -> None:
    """In a prefill's modules and in decode steps, against products in float64."""
    with copied("fp8_rounded") as (model, copy):
        layer: Any = copy.model.gpt_chunks[0].decoder.layers[0]
        linear = layer.self_attention.linear_qkv
        source: Any = model.gpt_chunks[0].decoder.layers[0]
        weight = source.self_attention.linear_qkv.weight.detach().double().numpy()
        values = torch.randn(9, SIZES.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
        rounded = expected_of_blocks(values.double().numpy(), 1, 128)
        expected = torch.from_numpy(rounded @ expected_of_blocks(weight, 128, 128).T)
        by_module, _ = linear(values[:, None])
        step = LeanForward(copy.model, KVCache(1, 16), records=False, round_inputs=copy.round_inputs)
        for found in (by_module[:, 0], step._linear(values, step._do.hold(linear.weight))):
            assert found.dtype == torch.bfloat16
            assert ((found.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all()
        experts, ends = layer.mlp.experts, torch.tensor([9, *[9] * (SIZES.num_experts - 1)], dtype=torch.int32)
        first = source.mlp.experts.linear_fc1.weight[0].detach().double().numpy()
        expected = torch.from_numpy(rounded @ expected_of_blocks(first, 128, 128).T)
        found = experts.linear_fc1(values, ends)
        assert ((found.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all()


def test_what_cannot_be_rounded_is_refused() -> None:
    local, other = Backend("local", "asked for"), Backend("transformer_engine", "a GPU")
    check_numerics(configured("bf16"), Backends(other, other, other))
    check_numerics(configured("fp8_rounded"), Backends(local, other, other))
    with pytest.raises(ConfigError, match=r"numerics=fp8_rounded .* set model\.backend\.experts=local"):
        check_numerics(configured("fp8_rounded"), Backends(other, other, other))
    for stage in ("rl", "sft"):
        with pytest.raises(ConfigError, match=r"rollout\.numerics=bf16 with model\.dtype=bf16"):
            load_config(None, [f"stage={stage}", "model=tiny", "model.dtype=bf16", "rollout.numerics=bf16"])
