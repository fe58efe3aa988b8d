"""A whole model as items to convert: which Hugging Face tensors make up each, and how a distributed checkpoint has it.

Every process takes its share of the items, or of batches of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from gspo_moe.model.experts import StackedShard
from gspo_moe.model.names import Entry
from gspo_moe.model.sharded import Shard, read_shards
from gspo_moe.model.weights import LocalTensor

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Item:
    """A parameter of the whole model, or an expert's slice: the HF tensors that it joins, and how it is stored."""

    entry: Entry
    parameter: torch.Tensor
    shard: Shard

    def __len__(self) -> int:
        return len(self.entry.hf_names)


def make_item(local: LocalTensor, shard: Shard) -> Item:
    """shard: of the parameter, which for stacked experts is that of all."""
    if local.expert is not None:
        assert isinstance(shard, StackedShard)
        shard = shard.part(local.expert)
    return Item(local.entry, local.of(local.parameter), shard)


def own_share(all_of_them: Sequence[Shared]) -> Sequence[Shared]:
    """What falls to this process."""
    return all_of_them[dist.get_rank() :: dist.get_world_size()]


def for_each_batch(
    path: Path, batches: Sequence[Sequence[Item]], use: Callable[[int, dict[str, torch.Tensor]], None]
) -> None:
    """Calls `use` with the number and the HF tensors of each batch of this process's share. Collective."""
    world_size = dist.get_world_size()
    for start in range(0, len(batches), world_size):
        number = start + dist.get_rank()
        # A process without a batch takes part in reading.
        batch = batches[number] if number < len(batches) else []
        found = read_shards(path, {item.parameter: item.shard for item in batch})
        tensors: dict[str, torch.Tensor] = {}
        for item in batch:
            tensors |= zip(item.entry.hf_names, item.entry.merge([found.pop(item.parameter)]), strict=True)
        if batch:
            use(number, tensors)
        del tensors


def in_batches(items: Sequence[Item], max_bytes: int) -> list[list[Item]]:
    """Cuts the items into runs of at most `max_bytes`, or of one item."""
    batches: list[list[Item]] = [[]]
    used = 0
    for item in items:
        if batches[-1] and used + item.parameter.nbytes > max_bytes:
            batches.append([])
            used = 0
        batches[-1].append(item)
        used += item.parameter.nbytes
    return batches
