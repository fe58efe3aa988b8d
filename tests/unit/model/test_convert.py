"""Conversions in one process; tests/e2e/test_convert.py has the command and several processes."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.loading import load_config
from gspo_moe.config.model import TokenizerConfig
from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import SentencePieceTokenizer, own_tokenizer
from gspo_moe.errors import CheckpointError, DataError
from gspo_moe.model import convert
from gspo_moe.model.convert import Conversion, hf_to_megatron, megatron_to_hf
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.sharded import load_stored_weights
from gspo_moe.parallel.groups import shut_down
from gspo_moe.training.checkpoint import Progress, save_checkpoint
from tests.manifests import reseal
from tests.memory import memory_profile, peak_bytes
from tests.policy import trained
from tests.qwen3 import Tensors, architecture, built, layout, reference_model, tensors_in

DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"


@pytest.fixture(autouse=True)
def _leave_the_job() -> Iterator[None]:
    yield
    shut_down()


def hf_folder(folder: Path, sizes: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Writes random weights as transformers would, and gives them."""
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in hf_shapes(sizes).items()}
    write_hf(folder, sizes, tensors)
    return tensors


def write_hf(folder: Path, sizes: Architecture, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes.to_hf()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def conversion(source: Path, target: Path, sizes: Architecture, **more: Any) -> Conversion:
    return Conversion(source, target, sizes, show_progress=False, **more)


def there_and_back(folder: Path, sizes: Architecture, **more: Any) -> dict[str, torch.Tensor]:
    """hf -> megatron -> again, with the number of compared tensors checked."""
    for make, source, target in ((hf_to_megatron, "hf", "megatron"), (megatron_to_hf, "megatron", "again")):
        count = make(conversion(folder / source, folder / target, sizes, **more))
        assert count == len(hf_shapes(sizes))
        shut_down()
    return tensors_in(folder / "again")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    sizes = architecture(tie_word_embeddings=tied)
    tensors = hf_folder(tmp_path / "hf", sizes, dtype)
    found = there_and_back(tmp_path, sizes, batch_bytes=20_000)
    assert found.keys() == tensors.keys()
    assert {value.dtype for value in found.values()} == {dtype}
    assert [name for name, value in tensors.items() if not torch.equal(value, found[name])] == []
    files = sorted(file.name for file in (tmp_path / "again").glob("*.safetensors"))
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == tensors.keys()
    assert not list(tmp_path.glob(".*"))


def test_a_model_starts_from_a_converted_checkpoint(tmp_path: Path) -> None:
    sizes = architecture()
    tensors = hf_folder(tmp_path / "hf", sizes, torch.bfloat16)
    hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", sizes))
    shut_down()
    with built(sizes, layout(), Tensors(tensors)) as model:
        expected = [parameter.clone() for parameter in model.gpt_chunks[0].parameters()]
        for parameter in model.gpt_chunks[0].parameters():
            parameter.data.fill_(7.0)
        load_stored_weights(model, tmp_path / "megatron")
        assert all(map(torch.equal, expected, model.gpt_chunks[0].parameters()))


@pytest.mark.parametrize("written", [torch.float32, torch.float16])
def test_another_dtype_rounds_once(written: torch.dtype, tmp_path: Path) -> None:
    sizes = architecture()
    tensors = hf_folder(tmp_path / "hf", sizes, written)
    found = there_and_back(tmp_path, sizes, dtype="bf16")
    assert [name for name, value in tensors.items() if not torch.equal(value.bfloat16(), found[name])] == []


def test_no_more_than_a_few_tensors_are_held_at_once(tmp_path: Path) -> None:
    sizes = architecture(hidden_size=128, num_hidden_layers=6, num_experts=16, moe_intermediate_size=64)
    tensors = hf_folder(tmp_path / "hf", sizes)
    batch = 10 * max(value.nbytes for value in tensors.values())
    assert 30 * batch < sum(value.nbytes for value in tensors.values())
    for make, source, target in ((hf_to_megatron, "hf", "megatron"), (megatron_to_hf, "megatron", "again")):
        with memory_profile() as profile:
            make(conversion(tmp_path / source, tmp_path / target, sizes, batch_bytes=batch))
        shut_down()
        peak = peak_bytes(profile, {file.stat().st_size for file in tmp_path.rglob("*.safetensors")})
        assert batch / 2 < peak < 2 * batch


BROKEN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "missing": (f"{DOWN}: missing", lambda tensors: tensors.pop(DOWN)),
    "unknown": ("model.bias: the architecture has no such tensor", lambda t: t.update({"model.bias": torch.ones(2)})),
    "misshapen": (f"{DOWN}: shape [24, 32], not [32, 24]", lambda t: t.update({DOWN: torch.ones(24, 32)})),
    "not finite": (f"{DOWN}: holds values that are not finite", lambda t: t[DOWN].fill_(float("nan"))),
    "float64": (f"{DOWN}: holds 1e+39, beyond", lambda t: t.update({DOWN: t[DOWN].double().fill_(1e39)})),
    "integers": (f"{DOWN}: dtype torch.int32; known are", lambda t: t.update({DOWN: t[DOWN].int()})),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_hf_folder_names_the_tensor(kind: str, tmp_path: Path) -> None:
    message, damage = BROKEN[kind]
    tensors = hf_folder(tmp_path / "hf", architecture())
    damage(tensors)
    write_hf(tmp_path / "hf", architecture(), tensors)
    with pytest.raises(DataError) as caught:
        hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", architecture()))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


OTHER_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "output_layer.weight: missing": ({"tie_word_embeddings": True}, {}),
    "output_layer.weight: the architecture has no such tensor": ({}, {"tie_word_embeddings": True}),
    f"{FC2}: shape [2, 8, 32, 24], not [2, 8, 32, 16]": ({}, {"moe_intermediate_size": 16}),
    "embedding.word_embeddings.weight: shape [61, 32], not [70, 32]": ({}, {"vocab_size": 70}),
    f"{FC2}: shape [2, 8, 32, 24], not [3, 8, 32, 24]": ({}, {"num_hidden_layers": 3}),
}


@pytest.mark.parametrize("message", OTHER_SIZES)
def test_a_checkpoint_of_another_model_names_the_tensor(message: str, tmp_path: Path) -> None:
    written, given = (architecture(**changes) for changes in OTHER_SIZES[message])
    hf_folder(tmp_path / "hf", written)
    hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", written))
    shut_down()
    with pytest.raises(CheckpointError) as caught:
        megatron_to_hf(conversion(tmp_path / "megatron", tmp_path / "again", given))
    assert message in str(caught.value)
    assert not (tmp_path / "again").exists()
    shut_down()
    with built(given, layout()) as model, pytest.raises(CheckpointError) as caught:
        load_stored_weights(model, tmp_path / "megatron")
    assert message in str(caught.value)


def test_end_tokens_go_through_a_runs_checkpoint_and_a_conversion(tmp_path: Path) -> None:
    sizes = architecture(vocab_size=300)
    SentencePieceTokenizer.train(["abc"], vocab_size=300).save(tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    tokenizer = own_tokenizer(TokenizerConfig(), tmp_path / "start")
    with trained(Config(), layout(), sizes) as (model, optimizer):
        step = save_checkpoint(tmp_path, model, optimizer, Progress(), keep=1, tokenizer=tokenizer)
    (tmp_path / "start" / "generation_config.json").unlink()
    config = load_config(None, [f"model={{checkpoint: {step}}}", f"tokenizer.path={tmp_path / 'start'}"])
    convert.convert(config, tmp_path / "hf")
    shut_down()
    for source, key, target in (("hf", "hf", "megatron"), ("megatron", "checkpoint", "again")):
        convert.convert(load_config(None, [f"model={{{key}: {tmp_path / source}}}"]), tmp_path / target)
        shut_down()
    for folder in (step, tmp_path / "hf", tmp_path / "megatron", tmp_path / "again"):
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [1, 9]
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [1, 9]


def test_a_runs_checkpoint_with_broken_weights_names_them(tmp_path: Path) -> None:
    sizes = architecture()
    with trained(Config(), layout(), sizes) as (model, optimizer):
        whole = save_checkpoint(tmp_path / "whole", model, optimizer, Progress(), keep=1)
        expected = model.gpt_chunks[0].decoder.final_layernorm.weight.detach().clone()
        model.gpt_chunks[0].decoder.layers[1].mlp.experts.linear_fc2.weight.data[3, 2, 5] = float("inf")
        broken = save_checkpoint(tmp_path / "broken", model, optimizer, Progress(), keep=1)
        with pytest.raises(CheckpointError, match=r"experts\.linear_fc2\.weight: holds values that are not finite"):
            load_stored_weights(model, broken)
    megatron_to_hf(conversion(whole, tmp_path / "hf", sizes))
    assert torch.equal(tensors_in(tmp_path / "hf")["model.norm.weight"], expected)
    shut_down()
    with pytest.raises(CheckpointError, match=f"{DOWN}: holds values that are not finite"):
        megatron_to_hf(conversion(broken, tmp_path / "hf2", sizes))


@pytest.mark.parametrize("back", [False, True])
def test_numbers_beyond_the_results_dtype_are_named_both_ways(back: bool, tmp_path: Path) -> None:
    sizes = architecture()
    tensors = hf_folder(tmp_path / "hf", sizes)
    tensors[DOWN][3, 4] = torch.finfo(torch.float32).max
    write_hf(tmp_path / "hf", sizes, tensors)
    if not back:
        with pytest.raises(DataError, match=rf"{DOWN}: holds 3\.40282e\+38, beyond torch\.bfloat16's largest"):
            hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", sizes, dtype="bf16"))
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
        return
    hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", sizes))
    shut_down()
    with pytest.raises(CheckpointError, match=f"{DOWN}: holds values that are not finite in torch.bfloat16"):
        megatron_to_hf(conversion(tmp_path / "megatron", tmp_path / "again", sizes, dtype="bf16"))
    assert not (tmp_path / "again").exists()
    shut_down()
    config = Config.model_validate({"model": {"preset": "tiny", "dtype": "bf16"}})
    with built(sizes, layout(), config=config) as model:
        found = r"experts\.linear_fc2\.weight: holds values that are not finite in torch.bfloat16"
        with pytest.raises(CheckpointError, match=found):
            load_stored_weights(model, tmp_path / "megatron")


def test_fused_experts_are_converted(tmp_path: Path) -> None:
    sizes = architecture()
    reference_model(sizes).save_pretrained(tmp_path / "hf", save_original_format=False)
    reference_model(sizes).save_pretrained(tmp_path / "single")
    found, expected = there_and_back(tmp_path, sizes), tensors_in(tmp_path / "single")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_checkpoint_that_lost_an_expert_names_it(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", architecture())
    hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", architecture()))
    shut_down()
    metadata = FileSystemReader(tmp_path / "megatron").read_metadata()
    tensor: Any = metadata.state_dict_metadata[FC2]
    lost = torch.Size((1, 3, 0, 0))
    tensor.chunks = [chunk for chunk in tensor.chunks if chunk.offsets != lost]
    with (tmp_path / "megatron" / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    reseal(tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=f"{DOWN}: holds values that are not finite"):
        megatron_to_hf(conversion(tmp_path / "megatron", tmp_path / "again", architecture()))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_an_error(file: str, tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", architecture())
    hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", architecture()))
    shut_down()
    damaged = tmp_path / "megatron" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"megatron(: damaged, | cannot be loaded ).* copy it again"):
        megatron_to_hf(conversion(tmp_path / "megatron", tmp_path / "again", architecture()))


def test_a_result_that_is_not_the_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_folder(tmp_path / "hf", architecture())
    hf_to_megatron(conversion(tmp_path / "hf", tmp_path / "megatron", architecture()))
    shut_down()

    def on_a_bad_disk(tensors: dict[str, torch.Tensor], file: Path) -> None:
        tensors[DOWN].view(torch.int32)[7, 7] ^= 1
        save_file(tensors, file)

    monkeypatch.setattr(convert, "save_tensors", on_a_bad_disk)
    with pytest.raises(CheckpointError) as caught:
        megatron_to_hf(conversion(tmp_path / "megatron", tmp_path / "again", architecture()))
    assert f"read back, it is not the source; convert again\n  {DOWN}: differs" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
