"""Reading megatron-core's distributed format so that nothing in a checkpoint runs code, whoever wrote it.

torch unpickles a checkpoint's `.metadata`, and objects in its `.distcp` files, as any pickle: each may name a function
to call. Here the first may name what `_METADATA` lists and the second what torch loads with `weights_only`.
All of megatron-core's functions that read a checkpoint are called from here.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata, planner
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import _get_layout

from gspo_moe.errors import CheckpointError


class _Folder:
    """In the place of the path of the folder that it was written to, and of whatever a file makes of it."""

    def __init__(self, *_: object) -> None: ...


# What writers of torch 2.2 to 2.13 and of megatron-core 0.16 and 0.19 put there; none of it does more than hold values.
_METADATA: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            planner.BytesIOWriteData,
            planner.SavePlan,
            planner.TensorWriteData,
            planner.WriteItem,
            planner.WriteItemType,
            _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # Of megatron-core before 0.16, with a field more.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): metadata.Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): planner.SavePlan,
    ("pathlib", "PosixPath"): _Folder,
    ("pathlib._local", "PosixPath"): _Folder,
}
_PICKLES_ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # an environment's word for other programs


def load(wanted: dict[str, Any], path: Path, *, validate_access_integrity: bool = True) -> dict[str, Any]:
    """`dist_checkpointing.load`. Collective."""
    with _harmless():
        found: dict[str, Any] = dist_checkpointing.load(
            wanted, str(path), validate_access_integrity=validate_access_integrity
        )
    return found


def load_common(path: Path) -> dict[str, Any]:
    """What a checkpoint holds once for all ranks."""
    with _harmless():
        found: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(path))
    return found


def load_tensors_metadata(path: Path) -> dict[str, ShardedTensor]:
    """Key, shape and dtype of every tensor, without its data."""
    with _harmless():
        found: dict[str, ShardedTensor] = dist_checkpointing.load_tensors_metadata(str(path))
    return found


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """In it torch's reading of distributed checkpoints, which megatron-core's goes through, runs no code of theirs."""
    before = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    environment = os.environ.pop(_PICKLES_ANYTHING, None)
    _put(_read_metadata, _load_bytes)
    try:
        yield
    finally:
        _put(*before)
        if environment is not None:
            os.environ[_PICKLES_ANYTHING] = environment


def _put(read_metadata: Any, load_bytes: Any) -> None:
    owners: tuple[Any, Any] = FileSystemReader, DefaultLoadPlanner
    owners[0].read_metadata, owners[1].load_bytes = read_metadata, load_bytes


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA:
            return _METADATA[module, name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise CheckpointError(f"its .metadata names {module}.{name}, which no checkpoint needs and which may run code")


@contextlib.contextmanager
def _unchanged(kinds: Iterable[Any]) -> Iterator[None]:
    """Pickles may set attributes of what they name: undone, and an error."""
    before = [(kind, dict(vars(kind))) for kind in kinds if hasattr(kind, "__dict__")]
    try:
        yield
    finally:
        changed = [kind.__name__ for kind, was in before if _restored(kind, was)]
    if changed:
        raise CheckpointError(f"its .metadata sets attributes of {', '.join(changed)}, which no checkpoint needs")


def _restored(kind: Any, was: Mapping[str, Any]) -> bool:
    """Whether anything had to be."""
    now = dict(vars(kind))
    for name in now.keys() - was.keys():
        delattr(kind, name)
    for name in [name for name, value in was.items() if now.get(name) is not value]:
        setattr(kind, name, was[name])
    return now != was


def _read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> metadata.Metadata:
    with (Path(reader.path) / ".metadata").open("rb") as file, _unchanged(_METADATA.values()):
        found = _Unpickler(file).load()
    if not isinstance(found, metadata.Metadata):
        raise CheckpointError("its .metadata holds something else")
    for place in (found.storage_data or {}).values():
        name = place.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
            raise CheckpointError(f"its .metadata names {name!r}, a file outside of it")
    found.storage_meta = metadata.StorageMeta(load_id=reader.load_id)
    return found


def _load_bytes(self: DefaultLoadPlanner, read_item: planner.ReadItem, value: io.BytesIO) -> None:
    found, name = torch.load(value, map_location="cpu", weights_only=True), read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], found)
    else:
        self.state_dict[name] = found
