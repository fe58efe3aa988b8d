"""Writing megatron-core's distributed format in this process, by torch's own writer, with checksums of what is written.

megatron-core's writer makes three processes for a save, one of which starts Python and imports torch anew, and hangs
where one of them is killed. Here a process writes its own file, itself or in a thread; nothing else can be killed.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gspo_moe.manifest import FileSums, SummedFile
from gspo_moe.model.sharded import Shard, checkpoint_errors, stored, stored_shape
from gspo_moe.model.verifying import MARK
from gspo_moe.parallel.stop import on_main, together

FORMAT = ("torch_dist", 1)
_BUFFER = 1 << 20  # a tensor is a dozen small writes and a large one


def begin_state(folder: Path, state: dict[str, Any], *, copied: bool) -> Writing:
    """A checkpoint of megatron-core's `state` in a folder that exists, of which each process's `write` is left to do.

    copied: into host memory, so that what `state` is of may change meanwhile. Collective. Raises as `together` does.
    """
    sharded, common = save_preprocess(state)
    on_main(lambda: _write_common(folder, common))
    mine = [value for value in nested_values(sharded) if is_main_replica(value.replica_id)]
    tensors = [value for value in mine if isinstance(value, ShardedTensor)]
    objects = [value for value in mine if isinstance(value, ShardedObject)]
    if copied:
        tensors = together(lambda: [replace(one, data=one.data.detach().to("cpu", copy=True)) for one in tensors])
        # What is on the host already is not copied ahead, which would be by a device's stream.
        return Writing(folder, _Planner(tensors, lambda piece: piece.data, objects), per_thread_copy_ahead=0)
    return Writing(folder, _Planner(tensors, lambda piece: piece.data.detach(), objects))


def write_streaming(folder: Path, shards: Iterable[Shard], make: Callable[[ShardedTensor], torch.Tensor]) -> None:
    """Writes a checkpoint that megatron-core reads, asking for a piece's values only when it is their turn. Collective.

    shards: this process's, of which no other process has one; their data may be on the meta device.
    make: gives the values of a stored piece. Raises CheckpointError where the folder cannot be written.
    """
    pieces = [piece for shard in shards for piece in stored(shard)]
    with checkpoint_errors(folder, "written", "free space on its disk, or name another folder"):
        # With nothing copied ahead, the writer holds one tensor of each key at most.
        writing = Writing(folder, _Planner(pieces, make), per_thread_copy_ahead=0)
        writing.write()
        writing.finish()
        on_main(lambda: _write_common(folder, {MARK: True}))


def _write_common(folder: Path, common: dict[str, Any]) -> None:
    torch.save(common, folder / "common.pt")
    save_config(CheckpointingConfig(*FORMAT), str(folder))


class Writing:
    """A checkpoint's tensors and objects, one file a process: planned and finished together, written by each alone."""

    def __init__(self, folder: Path, planner: _Planner, **how: Any) -> None:
        """Collective. Raises as `together` does."""
        self._files = _SummedFiles()
        self._planner = planner
        self._error: Exception | None = None
        # One thread: of several torch loses the errors.
        self._writer = FileSystemWriter(folder, thread_count=1, **how)
        self._writer.fs = self._files
        self._metadata: Metadata | None = None
        self._written: list[Any] = []
        local = together(self._local_plan)
        plans = _gathered(local)
        final = together(lambda: self._global_plan(plans))
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, final, src=0)
        self._plan = planner.finish_plan(mine[0])

    def write(self) -> None:
        """This process's file; touches no other process. `finish` raises what it raises."""
        try:
            self._written = self._writer.write_data(self._plan, self._planner).wait()
        except Exception as error:
            self._error = error

    def abandon(self, why: str) -> None:
        """Counts as failed, whatever becomes of a `write` that goes on."""
        self._error = TimeoutError(why)

    def finish(self) -> dict[str, FileSums]:
        """Writes what tells where everything is; checksums of what this process wrote. Collective.

        Raises as `together` does, where any process could not write.
        """
        written = _gathered(together(self._outcome))
        on_main(lambda: self._tell_where(written))
        # torch renames this one.
        return {name.removesuffix(".tmp"): sums for name, sums in self._files.sums.items()}

    def _local_plan(self) -> SavePlan:
        is_main = dist.get_rank() == 0
        self._planner.set_up_planner({}, self._writer.storage_meta(), is_main)
        self._writer.set_up_storage_writer(is_main)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _global_plan(self, plans: list[SavePlan] | None) -> list[SavePlan] | None:
        """Of the first process; None of the others."""
        if plans is None:
            return None
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def _tell_where(self, written: list[Any] | None) -> None:
        assert self._metadata is not None
        assert written is not None
        self._writer.finish(self._metadata, written)

    def _outcome(self) -> list[Any]:
        if self._error is not None:
            raise self._error
        return self._written


def _gathered(value: Any) -> list[Any] | None:
    """Every process's, on the first; None on the others. Collective."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found


class _SummedFiles(FileSystem):
    """How torch's writer opens files; sums: of those that are closed, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSums] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with SummedFile(Path(path)) as file:
            with io.BufferedWriter(file, _BUFFER) as stream:
                yield stream
            self.sums[Path(path).name] = file.sums


class _Planner(DefaultSavePlanner):
    """Writes pieces of tensors, and objects each as the list of one that megatron-core reads."""

    def __init__(
        self,
        pieces: Iterable[ShardedTensor],
        make: Callable[[ShardedTensor], torch.Tensor],
        objects: Iterable[ShardedObject] = (),
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces = {(piece.key, torch.Size(piece.global_offset)): piece for piece in pieces}
        self._make = make
        self._objects = {each.unique_key: _as_bytes(each.data) for each in objects}

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan([*map(_write_item, self._pieces.values()), *objects])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if index.offset is None:
            return io.BytesIO(self._objects[index.fqn])
        piece = self._pieces[index.fqn, index.offset]
        return self._make(piece).view(stored_shape(piece))


def _write_item(piece: ShardedTensor) -> WriteItem:
    offset = torch.Size(piece.global_offset)
    chunk = ChunkStorageMetadata(offset, torch.Size(stored_shape(piece)))
    properties = TensorProperties(dtype=piece.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(piece.global_shape))
    return WriteItem(MetadataIndex(piece.key, offset), WriteItemType.SHARD, tensor_data=data)


def _as_bytes(value: object) -> bytes:
    data = io.BytesIO()
    torch.save([value], data)
    return data.getvalue()
