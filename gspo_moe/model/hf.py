"""Writes the model as a Hugging Face folder, tensor by tensor: no rank ever holds more than one file's worth of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from gspo_moe import __version__
from gspo_moe.config.architecture import Architecture
from gspo_moe.data.end_tokens import GENERATION_FILE, read_json
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import DataError
from gspo_moe.files import replace_folder, stage, stage_folder, usual_mode
from gspo_moe.model.build import Model
from gspo_moe.model.placement import Placement, Reader, itself
from gspo_moe.model.verifying import add_manifest
from gspo_moe.model.weights import INDEX_FILE, SINGLE_FILE

MAIN = 0
EXPORTED_BY = "gspo_moe_version"
FILE_BYTES = 5_000_000_000
METADATA = {"format": "pt"}  # without which transformers refuses a file

TensorStream = Iterator[tuple[str, torch.Tensor]]


@torch.no_grad()
def export_hf(
    model: Model, folder: str | Path, tokenizer: Tokenizer | None = None, max_shard_bytes: int = FILE_BYTES
) -> None:
    """Writes safetensors in the parameters' dtype, config.json and the tokenizer's files; every rank calls it.

    The first rank writes into a hidden folder beside `folder` and renames it when complete; an earlier export there
    is replaced. A file holds at most `max_shard_bytes` bytes of weights, unless one tensor alone is larger.
    Raises DataError where `folder` holds something that is no export.
    """
    folder = Path(folder)
    refusal = [_refusal(folder) if dist.get_rank() == MAIN else None]
    dist.broadcast_object_list(refusal, src=MAIN)
    if refusal[0] is not None:
        raise DataError(refusal[0])
    if dist.get_rank() == MAIN:
        partial = stage_folder(folder)
        _write_weights(whole_tensors(model), partial, max_shard_bytes)
        write_config(partial, model.architecture, model.config.params_dtype, tokenizer)
        write_tokenizer(partial, tokenizer)
    else:
        for _ in whole_tensors(model):
            raise AssertionError("only the first rank gets whole tensors")
    add_manifest(stage(folder), {})
    if dist.get_rank() == MAIN:
        replace_folder(stage(folder), folder)
    dist.barrier()


def check_export(folder: Path) -> None:
    """Raises DataError where `export_hf` would refuse the folder."""
    refusal = _refusal(folder)
    if refusal is not None:
        raise DataError(refusal)


def _refusal(folder: Path) -> str | None:
    if not folder.exists():
        return None
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    config = folder / "config.json"
    if config.is_file() and f'"{EXPORTED_BY}"' in config.read_text(encoding="utf-8", errors="replace"):
        return None
    return f"{folder} exists and was not exported by gspo_moe, so it is not replaced; name another folder"


def whole_tensors(model: Model, read: Reader = itself) -> TensorStream:
    """Every HF tensor on the first rank's CPU, in the order of the layers; nothing on the others, which send.

    read: what of a parameter is meant, of its shape: itself, or its gradient.
    """
    placement = Placement(model, read)
    for joined in placement.joined:
        for name, tensor in placement.fetch(joined, MAIN):
            yield name, tensor.cpu()


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int) -> None:
    names_in: list[list[str]] = []
    total_bytes = 0
    for batch in _batches(tensors, max_shard_bytes):
        save_tensors(batch, folder / f"{len(names_in)}.safetensors")
        names_in.append(list(batch))
        total_bytes += sum(tensor.nbytes for tensor in batch.values())
    for number in range(len(names_in)):
        (folder / f"{number}.safetensors").rename(folder / file_name(number, len(names_in)))
    write_index(folder, names_in, total_bytes)


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """A safetensors file as transformers reads it."""
    with usual_mode(file):
        save_file(dict(tensors), file, metadata=METADATA)


def file_name(number: int, count: int) -> str:
    """The name of file `number`, from 0, of `count`."""
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, names_in: Sequence[Sequence[str]], total_bytes: int) -> None:
    """Says which file holds which tensors, where there are several; names_in: names in each."""
    if len(names_in) == 1:
        return
    file_of = {name: file_name(number, len(names_in)) for number, names in enumerate(names_in) for name in names}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": file_of})


def _batches(tensors: Iterator[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of tensors up to `max_bytes`; a group is emptied when the next one is asked for."""
    batch: dict[str, torch.Tensor] = {}
    batch_bytes = 0
    for name, tensor in tensors:
        if batch and batch_bytes + tensor.nbytes > max_bytes:
            yield batch
            batch.clear()
            batch_bytes = 0
        batch[name] = tensor.contiguous()
        batch_bytes += tensor.nbytes
    yield batch


def write_config(
    folder: Path, architecture: Architecture, dtype: torch.dtype, tokenizer: Tokenizer | None = None
) -> None:
    """Writes the `config.json` that transformers and `architecture_from_hf` read."""
    config = {
        **architecture.to_hf(),
        "torch_dtype": str(dtype).removeprefix("torch."),
        EXPORTED_BY: __version__,
    }
    if tokenizer is not None:
        config["eos_token_id"] = _eos_token_id(tokenizer)
    _write_json(folder / "config.json", config)


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Writes the tokenizer's files, and all its end tokens into `generation_config.json`, whose other keys stay."""
    if tokenizer is None:
        return
    tokenizer.save(folder)
    file = folder / GENERATION_FILE
    _write_json(file, {**read_json(file), "eos_token_id": _eos_token_id(tokenizer)})


def _eos_token_id(tokenizer: Tokenizer) -> int | list[int]:
    return tokenizer.eos_id if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
