import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.architecture import architecture_from_hf
from gspo_moe.config.model import ModelConfig, TokenizerConfig
from gspo_moe.config.rope import Yarn
from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import SentencePieceTokenizer, Tokenizer, own_tokenizer
from gspo_moe.errors import DataError
from gspo_moe.model import hf
from gspo_moe.model.build import build_model
from gspo_moe.model.hf import export_hf, write_config, write_tokenizer
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.weights import RandomSource, load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from tests.qwen3 import (
    Tensors,
    architecture,
    built,
    forward_logits,
    layout,
    random_sequences,
    reference_logits,
    tensors_in,
)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("tied", [True, False])
def test_hf_to_megatron_to_hf_is_exact(dtype: Any, torch_dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    sizes = architecture(tie_word_embeddings=tied)
    tensors = {name: torch.randn(shape).to(torch_dtype) for name, shape in hf_shapes(sizes).items()}
    config = Config(model=ModelConfig(preset="tiny", dtype=dtype))
    try:
        model = build_model(config, sizes, initialize(layout(), seed=1))
        load_weights(model, Tensors(tensors))
        export_hf(model, tmp_path / "out")
    finally:
        shut_down()
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    found = tensors_in(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == torch_dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_transformers_reads_the_export_and_computes_the_same_logits(max_shard_bytes: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    scaling = Yarn(factor=4.0, original_max_position_embeddings=8, truncate=False)
    sizes = architecture(initializer_range=0.2, norm_topk_prob=False, rope_theta=50_000.0, rope_scaling=scaling)
    sequences = random_sequences(sizes, (11, 4))
    with built(sizes, layout(), RandomSource(sizes, seed=5)) as model:
        export_hf(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
        (logits,) = forward_logits(model, [sequences])
    files = [file.name for file in (tmp_path / "out").glob("*.safetensors")]
    if max_shard_bytes == 20_000:
        assert f"model-00001-of-{len(files):05d}.safetensors" in files
        assert max((tmp_path / "out" / file).stat().st_size for file in files) < 26_000
    else:
        assert files == ["model.safetensors"]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reference.dtype == torch.float32
    assert architecture_from_hf(tmp_path / "out") == sizes
    for actual, expected in zip(logits, reference_logits(reference, sequences), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer: Tokenizer = SentencePieceTokenizer.train(["abc", "bca"], vocab_size=300)
    with built(architecture(), layout(), RandomSource(architecture(), seed=1)) as model:
        export_hf(model, tmp_path / "out", tokenizer)
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_id
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": tokenizer.eos_id}
    assert SentencePieceTokenizer.load(tmp_path / "out" / "tokenizer.model").encode("cab") == tokenizer.encode("cab")


def test_every_end_token_comes_along_and_generation_settings_stay(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = tmp_path / "in"
    SentencePieceTokenizer.train(["abc"], vocab_size=300).save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1], "top_k": 20}')
    tokenizer = own_tokenizer(TokenizerConfig(), folder)
    assert tokenizer is not None
    # A SentencePiece file has no other files of its own, a tokenizer.json brings its generation_config.json.
    for number, kept in enumerate(({}, {"top_k": 20})):
        out = tmp_path / str(number)
        out.mkdir()
        if kept:
            shutil.copy(folder / "generation_config.json", out)
        write_config(out, architecture(), torch.float32, tokenizer)
        write_tokenizer(out, tokenizer)
        assert AutoConfig.from_pretrained(out).eos_token_id == [1, 7]
        assert json.loads((out / "generation_config.json").read_text()) == kept | {"eos_token_id": [1, 7]}
        assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 7]
        again = own_tokenizer(TokenizerConfig(), out)
        assert again is not None
        assert again.eos_ids == (1, 7)


def test_an_earlier_export_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, folder = architecture(), tmp_path / "out"
    save_file, files = hf.save_file, iter(range(2))

    def stops_at_the_third_file(*arguments: Any, **more: Any) -> None:
        if next(files, None) is None:
            raise KeyboardInterrupt
        save_file(*arguments, **more)

    with built(sizes, layout(), RandomSource(sizes, seed=1)) as model:
        export_hf(model, folder, max_shard_bytes=20_000)
        load_weights(model, RandomSource(sizes, seed=2))
        monkeypatch.setattr(hf, "save_file", stops_at_the_third_file)
        with pytest.raises(KeyboardInterrupt):
            export_hf(model, folder, max_shard_bytes=20_000)
        monkeypatch.setattr(hf, "save_file", save_file)
        first = tensors_in(folder)
        export_hf(model, folder)
        second = tensors_in(folder)
    for name in hf_shapes(sizes):
        assert torch.equal(first[name], RandomSource(sizes, seed=1).get(name))
        assert torch.equal(second[name], RandomSource(sizes, seed=2).get(name))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with built(architecture(), layout()) as model, pytest.raises(DataError, match="name another folder"):
        export_hf(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
