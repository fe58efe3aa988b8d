import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gspo_moe.config.schema import Config
from gspo_moe.errors import DataError
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.weights import RandomSource, SafetensorsSource, TensorSource, load_weights
from tests.qwen3 import Tensors, architecture, built, layout, reference_model, tensors_in

SIZES = architecture()
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def random_tensors(tied: bool = False) -> dict[str, torch.Tensor]:
    shapes = hf_shapes(architecture(tie_word_embeddings=tied))
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def refusal(source: dict[str, torch.Tensor] | TensorSource, tied: bool = False, dtype: str = "fp32") -> str:
    given = Tensors(source) if isinstance(source, dict) else source
    sizes, config = (
        architecture(tie_word_embeddings=tied),
        Config.model_validate({"model": {"preset": "tiny", "dtype": dtype}}),
    )
    with built(sizes, layout(), config=config) as model, pytest.raises(DataError) as caught:
        load_weights(model, given)
    return str(caught.value)


def test_missing_unknown_and_misshapen_tensors_are_named_together() -> None:
    tensors = random_tensors()
    tensors[DOWN] = torch.zeros(3, 5)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.shared_expert.up_proj.weight"] = torch.zeros(2)
    message = refusal(tensors)
    assert f"{DOWN}: shape [3, 5], not [32, 24]" in message
    assert "model.norm.weight: missing" in message
    assert "model.layers.1.mlp.shared_expert.up_proj.weight: the architecture has no such tensor" in message
    assert message.count("\n") == 3


def test_numbers_that_are_not_finite_and_other_dtypes_are_named() -> None:
    tensors = random_tensors()
    tensors[DOWN][4, 7] = float("nan")
    tensors["lm_head.weight"][0, 0] = float("-inf")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
    message = refusal(tensors)
    assert f"{DOWN}: holds values that are not finite" in message
    assert "lm_head.weight: holds values that are not finite" in message
    assert "model.norm.weight: dtype torch.int64" in message
    assert message.count("\n") == 3


def test_numbers_beyond_the_parameters_dtype_are_named() -> None:
    tensors = random_tensors()
    tensors[DOWN] = tensors[DOWN].double()
    tensors[DOWN][4, 7] = -1e39
    tensors["model.norm.weight"][3] = torch.finfo(torch.float32).max
    assert f"{DOWN}: holds 1e+39, beyond torch.float32's largest, 3.40282e+38" in (message := refusal(tensors))
    assert message.count("\n") == 1
    message = refusal(tensors, dtype="bf16")
    assert f"{DOWN}: holds 1e+39, beyond torch.bfloat16's largest, 3.38953e+38" in message
    assert "model.norm.weight: holds 3.40282e+38, beyond torch.bfloat16's largest" in message
    assert message.count("\n") == 2


def test_only_ten_of_many_problems_are_shown() -> None:
    message = refusal({})
    assert message.count(": missing") == 10
    assert f"and {len(hf_shapes(SIZES)) - 10} more" in message


def test_an_lm_head_beside_tied_embeddings_must_equal_them() -> None:
    tensors = random_tensors(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    with built(architecture(tie_word_embeddings=True), layout(), Tensors(tensors)) as model:
        embedding = model.gpt_chunks[0].embedding.word_embeddings.weight
        assert torch.equal(embedding, tensors["lm_head.weight"])
    tensors["lm_head.weight"][0, 0] += 1
    assert "lm_head.weight: differs from model.embed_tokens.weight" in refusal(tensors, tied=True)


def test_a_checkpoint_in_several_files_reads_like_one_file(tmp_path: Path) -> None:
    reference = reference_model(SIZES)
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    expected = tensors_in(tmp_path / "one")
    for folder in ("one", "many"):
        source = SafetensorsSource(tmp_path / folder)
        assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        assert all(torch.equal(source.get(name), tensor) for name, tensor in expected.items())


def test_an_index_that_disagrees_with_its_files_names_the_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "c": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        SafetensorsSource(tmp_path)
    assert "b: in x.safetensors, not in the index" in str(caught.value)
    assert "c: not in x.safetensors, where the index has it" in str(caught.value)


def test_a_folder_without_weights_and_broken_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        SafetensorsSource(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": {"a": "absent.safetensors"}}'):
        index.write_text(text)
        with pytest.raises(DataError, match="copy it again"):
            SafetensorsSource(tmp_path)
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        SafetensorsSource(tmp_path)


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    source = RandomSource(SIZES, seed=7)
    names = [name for name in source.shapes() if not name.endswith("norm.weight")]
    drawn = {name: source.get(name) for name in names}
    again = RandomSource(architecture(num_hidden_layers=1), seed=7)
    assert all(torch.equal(again.get(name), drawn[name]) for name in reversed(names) if name in again.shapes())
    assert len({tensor.flatten()[0].item() for tensor in drawn.values()}) == len(names)
    assert not torch.equal(RandomSource(SIZES, seed=8).get(DOWN), drawn[DOWN])


def test_random_weights_have_the_architectures_deviation_and_norms_of_one() -> None:
    source = RandomSource(architecture(initializer_range=0.05), seed=1)
    values = torch.cat([source.get(name).flatten() for name in source.shapes() if not name.endswith("norm.weight")])
    assert len(values) > 40_000
    torch.testing.assert_close(values.std(), torch.tensor(0.05), atol=0.001, rtol=0)
    torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=0.001, rtol=0)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert torch.equal(source.get(name), torch.ones(source.shapes()[name]))
