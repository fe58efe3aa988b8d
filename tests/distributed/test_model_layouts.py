"""The same weights in every layout: logits, cached decoding and the HF export do not depend on it."""

import math
from pathlib import Path

import pytest
import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.rope import Yarn
from gspo_moe.model.hf import export_hf
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.weights import RandomSource, SafetensorsSource, load_weights
from tests.launch import launch
from tests.memory import memory_profile, peak_bytes
from tests.qwen3 import (
    architecture,
    built,
    cached_logits,
    forward_logits,
    layout,
    logits_at,
    random_sequences,
    reference_logits,
    reference_model,
    tensors_in,
)

YARN = Yarn(factor=4.0, original_max_position_embeddings=4)
# An odd vocabulary pads the last tensor rank, an odd pack sequence parallelism, an odd number of them the interleaved
# schedule.
SIZES = {
    "untied": architecture(num_hidden_layers=4, vocab_size=61, num_key_value_heads=2),
    "tied": architecture(
        num_hidden_layers=4, vocab_size=61, num_key_value_heads=4, tie_word_embeddings=True, rope_scaling=YARN
    ),
}
LENGTHS = ((1, 9, 5), (12,), (3, 4))
PROMPTS = (1, 4, 2)
ENDS = ((0, 9, 14), (), (6, 2))  # of the sequences, then of none, then in another order
LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [
        {"expert": 2},
        {"tensor": 2, "expert_tensor": 2},
        {"tensor": 2, "expert": 2, "expert_tensor": 1},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
    4: [
        {"expert": 2},
        {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    ],
}


def packs(sizes: Architecture) -> list[list[torch.Tensor]]:
    return [random_sequences(sizes, lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def check_layouts(world_size: int, folder: Path) -> None:
    for number, parallel in enumerate(LAYOUTS[world_size]):
        for kind, sizes in SIZES.items():
            expected = torch.load(folder / f"{kind}.pt")
            source = SafetensorsSource(folder / kind)
            with built(sizes, layout(world_size, **parallel), source) as model:
                found = forward_logits(model, packs(sizes))
                if model.groups.is_last_stage:
                    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
                chosen = logits_at(model, packs(sizes), ENDS)
                assert len(chosen) == len(found)
                for logits_NV, every, ends in zip(chosen, found, ENDS, strict=False):
                    torch.testing.assert_close(logits_NV, torch.cat(every)[list(ends)], atol=1e-5, rtol=0)
                cached = cached_logits(model, packs(sizes)[0], PROMPTS)
                if model.groups.is_last_stage:
                    whole = [torch.stack(logits) for logits in cached]
                    torch.testing.assert_close(whole, found[0], atol=1e-5, rtol=0)
                export_hf(model, folder / f"{kind}-{number}", max_shard_bytes=50_000)
                if kind == "untied":
                    load_weights(model, RandomSource(sizes, seed=3))
                    export_hf(model, folder / f"random-{number}")


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logits_and_exports_are_the_same_in_every_layout(world_size: int, tmp_path: Path) -> None:
    for kind, sizes in SIZES.items():
        reference = reference_model(sizes)
        reference.save_pretrained(tmp_path / kind)
        torch.save([reference_logits(reference, pack) for pack in packs(sizes)], tmp_path / f"{kind}.pt")
    launch(check_layouts, world_size, world_size, tmp_path)
    source = RandomSource(SIZES["untied"], seed=3)
    expected = {kind: tensors_in(tmp_path / kind) for kind in SIZES}
    expected["random"] = {name: source.get(name) for name in source.shapes()}
    for number, parallel in enumerate(LAYOUTS[world_size]):
        for kind, tensors in expected.items():
            found = tensors_in(tmp_path / f"{kind}-{number}")
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()), (kind, parallel)


def check_streaming(folder: Path) -> None:
    sizes = architecture(hidden_size=128, num_hidden_layers=4, num_experts=16, moe_intermediate_size=64)
    largest = max(math.prod(shape) for shape in hf_shapes(sizes).values()) * 4
    file_bytes = 8 * largest
    with built(sizes, layout(2, expert=2), RandomSource(sizes, seed=3)) as model:
        with memory_profile() as profile:
            export_hf(model, folder / "hf", max_shard_bytes=file_bytes)
        files = [file.stat().st_size for file in (folder / "hf").glob("*.safetensors")]
        assert sum(files) > 20 * file_bytes
        assert peak_bytes(profile) < file_bytes + 5 * largest
        with memory_profile() as profile:
            load_weights(model, SafetensorsSource(folder / "hf"))
        assert largest < peak_bytes(profile, files) < 4 * largest


def test_no_process_holds_more_than_a_few_tensors_beside_its_own(tmp_path: Path) -> None:
    launch(check_streaming, 2, tmp_path)
