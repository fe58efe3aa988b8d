"""Writing megatron-core's distributed format in this process, by torch's own writer.

megatron-core's writer makes three processes for a save, one of which starts Python and imports torch anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gspo_moe.model.sharded import Shard, checkpoint_errors, stored, stored_shape

FORMAT = ("torch_dist", 1)


class InProcessSave(torch_dist.TorchDistSaveShardedStrategy):
    """megatron-core's strategy for `dist_checkpointing.save` with one file a rank. Collective.

    Raises RuntimeError, on every rank, where any of them cannot write.
    """

    def __init__(self) -> None:
        super().__init__(*FORMAT)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        # One thread: torch loses the errors of others.
        writer = FileSystemWriter(checkpoint_dir, thread_count=1)
        try:
            torch.distributed.checkpoint.save(
                torch_dist.mcore_to_pyt_state_dict(by_key), storage_writer=writer, planner=planner
            )
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
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        torch.distributed.checkpoint.save({}, storage_writer=writer, planner=_StreamingPlanner(pieces, make))
        if dist.get_rank() == 0:
            torch.save({}, folder / "common.pt")
            save_config(CheckpointingConfig(*FORMAT), str(folder))
    dist.barrier()


class _StreamingPlanner(DefaultSavePlanner):
    def __init__(self, pieces: list[ShardedTensor], make: Callable[[ShardedTensor], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces = {(piece.key, torch.Size(piece.global_offset)): piece for piece in pieces}
        self._make = make

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self._pieces.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None
        piece = self._pieces[write_item.index.fqn, write_item.index.offset]
        return self._make(piece).view(stored_shape(piece))


def _write_item(piece: ShardedTensor) -> WriteItem:
    offset = torch.Size(piece.global_offset)
    chunk = ChunkStorageMetadata(offset, torch.Size(stored_shape(piece)))
    properties = TensorProperties(dtype=piece.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(piece.global_shape))
    return WriteItem(MetadataIndex(piece.key, offset), WriteItemType.SHARD, tensor_data=data)
