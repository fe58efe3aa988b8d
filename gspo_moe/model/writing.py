"""Writing megatron-core's distributed format in this process, by torch's own writer.

megatron-core's writer makes three processes for a save, one of which starts Python and imports torch anew.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gspo_moe.model.sharded import Shard, checkpoint_errors, stored, stored_shape
from gspo_moe.model.verifying import MARK

FORMAT = ("torch_dist", 1)


class InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's strategy for `dist_checkpointing.save`, with one file a rank. Collective.

    Raises RuntimeError, on every rank, where any of them cannot write.
    """

    def __init__(self) -> None:
        super().__init__(*FORMAT)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        mine = [value for value in nested_values(sharded_state_dict) if is_main_replica(value.replica_id)]
        tensors = [value for value in mine if isinstance(value, ShardedTensor)]
        objects = [value for value in mine if isinstance(value, ShardedObject)]
        try:
            _write(Path(checkpoint_dir), _Planner(tensors, lambda piece: piece.data.detach(), objects))
        except CheckpointException as error:  # which is no Exception
            raise RuntimeError(str(error)) from error


def write_streaming(folder: Path, shards: Iterable[Shard], make: Callable[[ShardedTensor], torch.Tensor]) -> None:
    """Writes a checkpoint that megatron-core reads, asking for a piece's values only when it is their turn. Collective.

    shards: this process's, of which no other process has one; their data may be on the meta device.
    make: gives the values of a stored piece. Raises CheckpointError where the folder cannot be written.
    """
    pieces = [piece for shard in shards for piece in stored(shard)]
    with checkpoint_errors(folder, "written", "free space on its disk, or name another folder"):
        # With nothing copied ahead, the writer holds one tensor of each key at most.
        _write(folder, _Planner(pieces, make), per_thread_copy_ahead=0)
        if dist.get_rank() == 0:
            torch.save({MARK: True}, folder / "common.pt")
            save_config(CheckpointingConfig(*FORMAT), str(folder))
    dist.barrier()


def _write(folder: Path, planner: _Planner, **how: Any) -> None:
    """One file a rank, and one thread: of several torch loses the errors."""
    writer = FileSystemWriter(folder, thread_count=1, **how)
    torch.distributed.checkpoint.save({}, storage_writer=writer, planner=planner, no_dist=dist.get_world_size() == 1)


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
        self._objects = {each.unique_key: each.data for each in objects}

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan([*map(_write_item, self._pieces.values()), *objects])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if index.offset is None:
            data = io.BytesIO()
            torch.save([self._objects[index.fqn]], data)
            return data
        piece = self._pieces[index.fqn, index.offset]
        return self._make(piece).view(stored_shape(piece))


def _write_item(piece: ShardedTensor) -> WriteItem:
    offset = torch.Size(piece.global_offset)
    chunk = ChunkStorageMetadata(offset, torch.Size(stored_shape(piece)))
    properties = TensorProperties(dtype=piece.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(piece.global_shape))
    return WriteItem(MetadataIndex(piece.key, offset), WriteItemType.SHARD, tensor_data=data)
