from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.model.names import Entry, Place, entry_of, hf_shapes
from tests.qwen3 import architecture, reference_model, tensors_in

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.experts.linear_fc1.weight0"
FC2 = "decoder.layers.0.mlp.experts.linear_fc2.weight0"


def entries(
    parameter: str, sizes: Architecture, count: int, layers: tuple[int, ...] = (0,), first_expert: int = 0
) -> Iterator[Entry]:
    """The parameter's entry on each of `count` ranks of both tensor groups."""
    for rank in range(count):
        place = Place((rank, count), (rank, count), layers, first_expert)
        yield entry_of(parameter, sizes, place, hf_shapes(sizes))


def test_qkv_holds_for_each_kv_group_its_query_heads_key_and_value() -> None:
    sizes = architecture(num_attention_heads=8, num_key_value_heads=4, head_dim=2, hidden_size=1)
    query, key, value = torch.arange(16.0)[:, None], 100 + torch.arange(8.0)[:, None], 200 + torch.arange(8.0)[:, None]
    found = [
        entry.join([entry.cut(whole) for whole in (query, key, value)])[:, 0].tolist()
        for entry in entries(QKV, sizes, count=2)
    ]
    assert found == [
        [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203],
        [8, 9, 10, 11, 104, 105, 204, 205, 12, 13, 14, 15, 106, 107, 206, 207],
    ]


def test_gate_and_up_are_cut_each_by_itself() -> None:
    sizes = architecture(moe_intermediate_size=6, hidden_size=1)
    gate, up = torch.arange(6.0)[:, None], 10 + torch.arange(6.0)[:, None]
    found = [entry.join([entry.cut(gate), entry.cut(up)])[:, 0].tolist() for entry in entries(FC1, sizes, count=2)]
    assert found == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]


def test_the_vocabulary_is_padded_with_zero_rows_and_ranks_beyond_it_hold_nothing_else() -> None:
    sizes = architecture(vocab_size=9, hidden_size=1)
    whole = torch.arange(1.0, 10.0)[:, None]
    found = [entry.cut(whole)[:, 0].tolist() for entry in entries("embedding.word_embeddings.weight", sizes, count=8)]
    assert found == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("parameter", [QKV, FC1, FC2, "output_layer.weight", "decoder.final_layernorm.weight"])
def test_merging_every_ranks_parameter_gives_the_hf_tensors_back(parameter: str, count: int) -> None:
    sizes = architecture(num_key_value_heads=4)
    shapes = hf_shapes(sizes)
    wholes: list[torch.Tensor] = []
    joined = []
    for entry in entries(parameter, sizes, count):
        wholes = wholes or [torch.randn(shapes[name]) for name in entry.hf_names]
        joined.append(entry.join([entry.cut(whole) for whole in wholes]))
        assert joined[-1].shape == entry.shape
    for merged, whole in zip(entry.merge(joined), wholes, strict=True):
        assert torch.equal(merged, whole)


def test_layers_and_experts_are_numbered_in_the_whole_model() -> None:
    sizes = architecture(num_hidden_layers=8, num_experts=16)
    for number in (0, 3, 7):
        parameter = f"decoder.layers.1.mlp.experts.linear_fc2.weight{number}"
        (entry,) = entries(parameter, sizes, count=1, layers=(2, 6), first_expert=8)
        assert entry.hf_names == (f"model.layers.6.mlp.experts.{8 + number}.down_proj.weight",)
    with pytest.raises(AssertionError, match="no HF tensor is known"):
        list(entries("decoder.layers.0.mlp.experts.linear_fc1.bias0", sizes, 1))


@pytest.mark.parametrize(("tied", "name"), [(True, "model.embed_tokens.weight"), (False, "lm_head.weight")])
def test_the_output_layer_is_the_embedding_when_tied(tied: bool, name: str) -> None:
    (entry,) = entries("output_layer.weight", architecture(tie_word_embeddings=tied), count=1)
    assert entry.hf_names == (name,)


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_that_transformers_writes(tied: bool, tmp_path: Path) -> None:
    sizes = architecture(tie_word_embeddings=tied)
    reference_model(sizes).save_pretrained(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors_in(tmp_path).items()} == hf_shapes(sizes)
