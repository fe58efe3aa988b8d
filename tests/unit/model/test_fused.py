"""Experts as transformers 5 fuses them on disk: the same tensors as one by one, read a slice at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_moe.config import architecture_from_hf
from gspo_moe.errors import DataError
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.weights import SafetensorsSource, check_shapes
from tests.qwen3 import architecture, built, forward_logits, layout, random_sequences, reference_logits, reference_model

SIZES = architecture(num_experts=8, moe_intermediate_size=24)
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
SINGLE = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model three times: `single`, `fused`, and `sharded`, which is fused in several files."""
    folder = tmp_path_factory.mktemp("hf")
    model = reference_model(SIZES)
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "fused", save_original_format=False)
    model.save_pretrained(folder / "sharded", save_original_format=False, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("kind", ["fused", "sharded"])
def test_fused_experts_are_the_single_ones(kind: str, folders: Path) -> None:
    single, fused = SafetensorsSource(folders / "single"), SafetensorsSource(folders / kind)
    assert fused.shapes()[GATE_UP] == (8, 48, 32)
    check_shapes(SIZES, fused)
    for name in hf_shapes(SIZES):
        assert torch.equal(fused.get(name), single.get(name)), name


def test_a_model_of_fused_experts_has_the_logits_of_transformers(folders: Path) -> None:
    sequences = random_sequences(SIZES, (9, 14))
    with built(architecture_from_hf(folders / "fused"), layout(), SafetensorsSource(folders / "fused")) as model:
        (logits,) = forward_logits(model, [sequences])
    for actual, expected in zip(logits, reference_logits(reference_model(SIZES), sequences), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_an_expert_is_read_without_the_others(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SafetensorsSource(folders / "fused")
    opened, taken = source._open("model.safetensors"), []

    class Watched:
        def get_slice(self, name: str) -> Watched:
            self.slice = opened.get_slice(name)
            return self

        def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
            found: torch.Tensor = self.slice[part]
            taken.append(found.shape)
            return found

    monkeypatch.setattr(source, "_open", lambda _: Watched())
    assert source.get(SINGLE).shape == (24, 32)
    assert taken == [(1, 24, 32)]


def test_layers_may_be_stored_differently(folders: Path, tmp_path: Path) -> None:
    single, fused = (load_file(folders / kind / "model.safetensors") for kind in ("single", "fused"))
    mixed = {name: value for name, value in single.items() if "layers.1.mlp.experts" not in name}
    save_file(mixed | {GATE_UP: fused[GATE_UP], DOWN: fused[DOWN]}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    check_shapes(SIZES, source)
    assert all(torch.equal(source.get(name), single[name]) for name in hf_shapes(SIZES))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (GATE_UP, torch.zeros(7, 48, 32), f"{GATE_UP}: shape [7, 48, 32], not [8, 48, 32]"),
        (GATE_UP, torch.zeros(8, 32, 48), f"{GATE_UP}: shape [8, 32, 48], not [8, 48, 32]"),
        (DOWN, torch.zeros(8, 24, 32), f"{DOWN}: shape [8, 24, 32], not [8, 32, 24]"),
        (DOWN, torch.zeros(4), f"{DOWN}: shape [4], not [8, 32, 24]"),
        (SINGLE, torch.zeros(24, 32), f"{SINGLE}: also in {GATE_UP}, of which there must be one"),
        (f"{GATE_UP}_bias", torch.zeros(8, 48), f"{GATE_UP}_bias: the architecture has no such tensor"),
    ],
)
def test_fused_tensors_that_do_not_fit_are_named(
    name: str, value: torch.Tensor, message: str, folders: Path, tmp_path: Path
) -> None:
    tensors = load_file(folders / "fused" / "model.safetensors") | {name: value}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError) as caught:
        check_shapes(SIZES, SafetensorsSource(tmp_path))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 1
