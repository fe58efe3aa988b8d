"""Weights between a Hugging Face folder and megatron-core's distributed checkpoint, both ways, a few tensors at a time.

A distributed checkpoint has no layout, so neither has a conversion: shapes come from a model without memory, every
process converts its share of the tensors, and any layout reads the result. A process holds a few of the largest
tensors while it writes a checkpoint, and one file's tensors while it writes a Hugging Face folder or compares.

Both directions end with a comparison: every tensor, read back from the result, is the source's, bit for bit (where
dtypes differ: the source's in the result's dtype). Only then does the result take its name.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.checks import check_files
from gspo_moe.config.layout import Layout
from gspo_moe.config.model import ModelConfig
from gspo_moe.config.outputs import output_fault
from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import Tokenizer, own_tokenizer
from gspo_moe.errors import CheckpointError, DataError
from gspo_moe.files import replace_folder, stage, stage_folder
from gspo_moe.model.build import build_model
from gspo_moe.model.hf import FILE_BYTES, file_name, save_tensors, write_config, write_index, write_tokenizer
from gspo_moe.model.items import Item, for_each_batch, in_batches, make_item, own_share
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.sharded import (
    MISFIT,
    check_stored,
    not_finite,
    raise_together,
    stored,
    stored_tensors,
    weight_shards,
    with_data,
)
from gspo_moe.model.verifying import add_manifest, check_checkpoint, check_export
from gspo_moe.model.weights import SafetensorsSource, check_shapes, local_tensors, value_problems
from gspo_moe.model.writing import write_streaming
from gspo_moe.parallel.groups import initialize, world_size_from_environment
from gspo_moe.parallel.stop import on_main


@dataclass(frozen=True)
class Conversion:
    """What to convert into what. `source` has a config.json, which `architecture` was read from.

    dtype: of the result, `fp32` or `bf16`; None for bf16 where the whole source is, else fp32.
    tokenizer: goes into the result. batch_bytes: of one HF file, and of what is compared at a time.
    """

    source: Path
    target: Path
    architecture: Architecture
    dtype: str | None = None
    tokenizer: Tokenizer | None = None
    batch_bytes: int = FILE_BYTES
    timeout_minutes: float = 10.0
    show_progress: bool = True


def convert(config: Config, target: Path) -> int:
    """Converts what `model.hf` or `model.checkpoint` names into the other kind; how many tensors were compared.

    Of the config, `model.dtype` counts where it is given, `tokenizer`, `parallel.timeout_minutes` and
    `logging.progress`. Without `tokenizer.path` the source's own tokenizer, if it has one, goes into the result.
    Raises ConfigError, DataError and CheckpointError for what cannot be converted and for a target that exists
    or cannot be written.
    Collective.
    """
    check_files(config, run_folder=False)
    if target.exists():
        raise CheckpointError(f"{target} exists; name a folder that does not, or remove it")
    fault = output_fault(target, folder=True)
    if fault is not None:
        raise CheckpointError(fault)
    assert config.model.folder is not None
    source = Path(config.model.folder)
    conversion = Conversion(
        source=source,
        target=target,
        architecture=config.model.architecture(),
        dtype=config.model.dtype if "dtype" in config.model.model_fields_set else None,
        tokenizer=own_tokenizer(config.tokenizer, source),
        timeout_minutes=config.parallel.timeout_minutes,
        show_progress=config.logging.progress,
    )
    return hf_to_megatron(conversion) if config.model.hf is not None else megatron_to_hf(conversion)


@torch.no_grad()
def hf_to_megatron(conversion: Conversion) -> int:
    """Writes an HF folder's weights as a distributed checkpoint; how many tensors were compared. Collective.

    Raises DataError that names tensors which are missing, unknown, misshapen, of an unknown dtype or not finite in the
    result's, and CheckpointError where the result cannot be written or differs at the end.
    """
    source = SafetensorsSource(conversion.source)
    check_shapes(conversion.architecture, source)
    items = _whole_model(conversion, conversion.dtype or _dtype(source.is_bf16))
    check_export(conversion.source)
    with _staged(conversion, items) as folder, _progress(conversion) as bar:
        _write_megatron(own_share(items), source, folder, bar)
        return _compare(items, folder, source, conversion, bar)


@torch.no_grad()
def megatron_to_hf(conversion: Conversion) -> int:
    """Writes a distributed checkpoint's weights as an HF folder; how many tensors were compared. Collective.

    Raises CheckpointError that names tensors which are missing, unknown, misshapen or not finite in the result's dtype,
    or differ at the end.
    """
    dtypes = {tensor.dtype for tensor in stored_tensors(conversion.source).values()}
    items = _whole_model(conversion, conversion.dtype or _dtype(dtypes == {torch.bfloat16}))
    check_checkpoint(conversion.source)
    check_stored(conversion.source, [item.shard for item in items], conversion.architecture)
    with _staged(conversion, items) as folder, _progress(conversion) as bar:
        _write_hf(items, conversion, folder, bar)
        return _compare(items, conversion.source, SafetensorsSource(folder), conversion, bar)


def _dtype(is_bf16: bool) -> str:
    return "bf16" if is_bf16 else "fp32"


def _whole_model(conversion: Conversion, dtype: str) -> list[Item]:
    """Every parameter, in the order of the HF model's tensors; joins the job."""
    world_size = world_size_from_environment()
    whole = Layout(
        data=world_size,
        expert_data=world_size,
        tensor=1,
        pipeline=1,
        virtual_pipeline=None,
        expert=1,
        expert_tensor=1,
        context=1,
        sequence_parallel=False,
    )
    groups = initialize(whole, seed=0, timeout_minutes=conversion.timeout_minutes)
    config = Config(model=ModelConfig.model_validate({"preset": "tiny", "dtype": dtype, "backend": "local"}))
    model = build_model(config, conversion.architecture, groups, on_meta=True)
    shards = weight_shards(model)
    order = {name: number for number, name in enumerate(hf_shapes(conversion.architecture))}
    items = [make_item(local, shards[local.parameter]) for local in local_tensors(model)]
    return sorted(items, key=lambda item: order[item.entry.hf_names[0]])


@contextlib.contextmanager
def _staged(conversion: Conversion, items: Sequence[Item]) -> Iterator[Path]:
    """A hidden folder beside the target, which gets the target's name at the end and goes away after an error."""
    target, is_main = conversion.target, dist.get_rank() == 0
    partial = stage(target)
    on_main(lambda: stage_folder(target))
    try:
        yield partial
        dtype = items[0].parameter.dtype
        on_main(lambda: write_config(partial, conversion.architecture, dtype, conversion.tokenizer))
        on_main(lambda: write_tokenizer(partial, conversion.tokenizer))
        add_manifest(partial, {})
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    on_main(lambda: replace_folder(partial, target))


@contextlib.contextmanager
def _progress(conversion: Conversion) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = conversion.show_progress and dist.get_rank() == 0
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield bar


def _task(bar: Progress, name: str, items: Sequence[Item]) -> TaskID:
    share = f" (this process's share of {dist.get_world_size()})" if dist.get_world_size() > 1 else ""
    return bar.add_task(name + share, total=sum(len(item) for item in items))


def _write_megatron(items: Sequence[Item], source: SafetensorsSource, folder: Path, bar: Progress) -> None:
    item_of = {(piece.key, piece.global_offset): item for item in items for piece in stored(item.shard)}
    task = _task(bar, "writing", items)
    problems: list[str] = []
    made: dict[int, list[ShardedTensor]] = {}  # the pieces of one item, which are asked for one after another

    def make(piece: ShardedTensor) -> torch.Tensor:
        item = item_of[piece.key, piece.global_offset]
        if id(item) not in made:
            made.clear()
            values = {name: source.get(name) for name in item.entry.hf_names}
            dtype = item.parameter.dtype
            problems.extend(one for name, value in values.items() for one in value_problems(name, value, dtype))
            parameter = item.entry.join([item.entry.cut(value) for value in values.values()])
            made[id(item)] = stored(with_data(item.shard, parameter.to(dtype)))
            bar.advance(task, len(item))
        by_key = {(one.key, one.global_offset): one.data for one in made[id(item)]}
        return by_key[piece.key, piece.global_offset]

    write_streaming(folder, [item.shard for item in items], make)
    raise_together(source, MISFIT, problems, DataError)


def _write_hf(items: Sequence[Item], conversion: Conversion, folder: Path, bar: Progress) -> None:
    batches = in_batches(items, conversion.batch_bytes)
    task = _task(bar, "writing", [item for batch in own_share(batches) for item in batch])
    problems: list[str] = []

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        problems.extend(not_finite(tensors.items()))
        save_tensors(tensors, folder / file_name(number, len(batches)))
        bar.advance(task, len(tensors))

    for_each_batch(conversion.source, batches, write)
    raise_together(conversion.source, MISFIT, problems)
    if dist.get_rank() == 0:
        names = [[name for item in batch for name in item.entry.hf_names] for batch in batches]
        write_index(folder, names, sum(item.parameter.nbytes for item in items))
    dist.barrier()


def _compare(
    items: Sequence[Item], megatron: Path, hf: SafetensorsSource, conversion: Conversion, bar: Progress
) -> int:
    """Compares every tensor of the two, as they are on disk; how many there are."""
    batches = in_batches(items, conversion.batch_bytes)
    task = _task(bar, "comparing", [item for batch in own_share(batches) for item in batch])
    problems: list[str] = []

    def compare(_: int, tensors: dict[str, torch.Tensor]) -> None:
        differ = (name for name, value in tensors.items() if not torch.equal(hf.get(name).to(value.dtype), value))
        problems.extend(f"{name}: differs" for name in differ)
        problems.extend(not_finite(tensors.items()))
        bar.advance(task, len(tensors))

    for_each_batch(megatron, batches, compare)
    raise_together(conversion.target, "read back, it is not the source; convert again", problems)
    return sum(len(item) for item in items)
