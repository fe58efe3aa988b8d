"""The Transformer Engine backend on its stand-in; `test_transformer_engine.py` runs these in a process of their own."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformer_engine.pytorch import DotProductAttention, GroupedLinear, Linear, RMSNorm

from gspo_moe.config.schema import Config
from gspo_moe.model import build
from gspo_moe.model.attention import context_params
from gspo_moe.model.build import Model
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.model.hf import export_hf, whole_tensors
from gspo_moe.model.torch_attention import TorchAttention
from gspo_moe.model.weights import RandomSource, SafetensorsSource
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.platform import Backend, Backends
from gspo_moe.platform.backend import LAYERS
from gspo_moe.scoring.score import score
from gspo_moe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gspo_moe.training.optimizer import Optimizer, UpdateResult
from gspo_moe.types import TrainingSample
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import (
    architecture,
    built,
    cached_logits,
    forward_logits,
    layout,
    random_sequences,
    reference_logits,
    reference_model,
    tensors_in,
)
from tests.steps import train_minibatch


def take(monkeypatch: pytest.MonkeyPatch, name: str, **parts: str) -> None:
    """Has every part from `name`, but for those of `parts`."""
    chosen = {part: Backend(parts.get(part, name), "for this test") for part in LAYERS}  # type: ignore[arg-type]
    monkeypatch.setattr(build, "choose_backends", lambda *_: Backends(**chosen))


@pytest.fixture(autouse=True)
def _transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "transformer_engine")


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_prefill_decoding_and_export_are_transformers(key_value_heads: int, tmp_path: Path) -> None:
    sizes = architecture(num_key_value_heads=key_value_heads)
    reference = reference_model(sizes)
    reference.save_pretrained(tmp_path / "in")
    sequences = random_sequences(sizes, (9, 6, 12), seed=3)
    with built(sizes, layout(), SafetensorsSource(tmp_path / "in")) as model:
        (full,) = forward_logits(model, [sequences])
        cached = cached_logits(model, sequences, prompt_lengths=(4, 4, 1))
        export_hf(model, tmp_path / "out")
        kinds = {type(module).__mro__ for module in model.chunks[0].modules()}
    for kind in (DotProductAttention, GroupedLinear, Linear, RMSNorm):
        assert any(kind in mro for mro in kinds), f"no {kind.__name__} in the model"
    for actual, expected, once in zip(full, reference_logits(reference, sequences), cached, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.stack(once), actual, atol=1e-5, rtol=0)
    found, expected_tensors = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "in")
    assert found.keys() == expected_tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_tensors.items())


def test_a_context_parallel_ranks_stretches_are_attended_to_as_by_the_local_kernel() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    split = ContextSplit(torch.tensor([0, 13, 14, 22]), group)
    params = context_params(split.local(torch.arange(22)), split, SIZES, torch.float32)
    generator = torch.Generator().manual_seed(5)
    heads, groups, size = SIZES.num_attention_heads, SIZES.num_key_value_heads, SIZES.head_dim
    query = torch.randn(split.num_local, heads, size, generator=generator)
    key, value = torch.randn(2, len(params.keys_K), groups, size, generator=generator)
    with built(SIZES, layout()) as model:
        attention = model.gpt_chunks[0].decoder.layers[0].self_attention.core_attention
        found = attention.over_stretches(query, key, value, params)
        # It takes the keys as they come and joins no exchange of its own.
        config = replace(model.config, context_parallel_size=2)
        assert type(attention)(config, 1, AttnMaskType.causal, "self").config.context_parallel_size == 1
    expected = TorchAttention(model.config, 1).over_stretches(query, key, value, params)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def step(config: Config, model: Model, optimizer: Optimizer) -> UpdateResult:
    """One GSPO step in which some sequences are clipped."""
    samples = [
        TrainingSample(tuple(ids.tolist()), (0, *(1,) * (len(ids) - 1)), advantage=(-1.0) ** number)
        for number, ids in enumerate(random_sequences(SIZES, (9, 14, 5), seed=8))
    ]
    packs = packs_of(samples, per_pack=2)
    generator = torch.Generator().manual_seed(9)
    old = [T + 2e-3 * torch.randn(T.shape, generator=generator) for T in score(model, packs)]
    return train_minibatch(model, optimizer, packs, old, config.algorithm, len(samples), 1.0, None).update


def main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """Gradient of every HF tensor in one step, and their norm."""
    with trained(config, layout()) as (model, optimizer):
        norm = torch.tensor(step(config, model, optimizer).grad_norm)
        return {"norm": norm} | {name: T.clone() for name, T in whole_tensors(model, main_grad)}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_are_those_of_the_local_layers(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"parallel": {"recompute": recompute}})
    actual = gradients(config)
    take(monkeypatch, "local")
    expected = gradients(config)
    assert actual.keys() == expected.keys()
    assert expected["norm"] > 0.01
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("part", LAYERS)
@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_each_part_is_chosen_on_its_own(part: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "local")
    expected = gradients(Config())
    (other,) = {"local", "transformer_engine"} - {backend}
    take(monkeypatch, backend, **{part: other})
    actual = gradients(Config())
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    with built(SIZES, layout()) as model:
        layer = model.gpt_chunks[0].decoder.layers[0]
        norms, attention = layer.input_layernorm, layer.self_attention
        kinds = {
            "experts": isinstance(layer.mlp.experts, GroupedExperts),
            "attention": isinstance(attention.core_attention, TorchAttention),
            "norms": not isinstance(norms, RMSNorm),
        }
        assert isinstance(attention.linear_qkv, Linear) is not kinds["attention"]
        assert isinstance(attention.q_layernorm, RMSNorm) is not kinds["norms"]
    assert kinds == {name: (other if name == part else backend) == "local" for name in LAYERS}


def weights_and_next_step(model: Model, optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], float]:
    weights = {name: tensor.clone() for name, tensor in whole_tensors(model)}
    return weights, step(Config(), model, optimizer).grad_norm


def test_either_backend_goes_on_from_the_others_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RandomSource(SIZES, seed=9)
    for writer, reader in (("transformer_engine", "local"), ("local", "transformer_engine")):
        take(monkeypatch, writer)
        with trained(Config(), layout()) as (model, optimizer):
            step(Config(), model, optimizer)
            path = save_checkpoint(tmp_path / writer, model, optimizer, Progress(step=1), keep=1)
            step(Config(), model, optimizer)
            load_checkpoint(path, model, optimizer)
            expected, norm = weights_and_next_step(model, optimizer)
        take(monkeypatch, reader)
        with trained(Config(), layout(), source=other) as (model, optimizer):
            assert load_checkpoint(path, model, optimizer) == Progress(step=1)
            found, found_norm = weights_and_next_step(model, optimizer)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert found_norm == pytest.approx(norm, rel=1e-5)
