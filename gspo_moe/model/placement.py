"""Which processes hold which part of each HF tensor, and how whole tensors come to one of them, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_moe.model.build import Model
from gspo_moe.model.names import Entry, hf_shapes
from gspo_moe.model.weights import LocalTensor, local_tensors
from gspo_moe.parallel.reduce import gather_objects

Reader = Callable[[torch.nn.Parameter], torch.Tensor]
_Key = tuple[tuple[str, ...], int]


def itself(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter


@dataclass(frozen=True)
class Joined:
    """HF tensors that one parameter of each of `entry.count` ranks is made from.

    holders: the ranks that have each part, by its index.
    """

    entry: Entry
    dtype: torch.dtype
    holders: tuple[tuple[int, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.entry.hf_names

    @property
    def nbytes(self) -> int:
        """Of the whole tensors."""
        return sum(torch.Size(shape).numel() for shape in self.entry.hf_shapes) * self.dtype.itemsize


class Placement:
    """Of a model whose parameters stay where they are. Making one is collective.

    read: what of a parameter is meant, of its shape: itself, or its gradient.
    """

    def __init__(self, model: Model, read: Reader = itself) -> None:
        self._read = read
        self._mine: dict[_Key, LocalTensor] = {
            (local.entry.hf_names, local.entry.index): local for local in local_tensors(model)
        }
        self.device = next(model.chunks[0].parameters()).device
        holders: dict[_Key, list[int]] = {}
        entries: dict[tuple[str, ...], tuple[Entry, torch.dtype]] = {}
        mine = [(local.entry, read(local.parameter).dtype) for local in self._mine.values()]
        for rank, held in enumerate(gather_objects(mine)):
            for entry, dtype in held:
                holders.setdefault((entry.hf_names, entry.index), []).append(rank)
                entries.setdefault(entry.hf_names, (entry, dtype))
        order = {name: number for number, name in enumerate(hf_shapes(model.architecture))}
        assert {name for names in entries for name in names} == order.keys(), "some HF tensor has no parameter"
        self.joined = [
            Joined(entry, dtype, tuple(tuple(holders[names, index]) for index in range(entry.count)))
            for names, (entry, dtype) in sorted(entries.items(), key=lambda item: order[item[0][0]])
        ]

    def fetch(self, joined: Joined, to: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole tensors, on rank `to` where its parameters are; nothing on the others, which send.

        All ranks call it for the same tensors in the same order.
        """
        shards = []
        for index, holders in enumerate(joined.holders):
            holder = to if to in holders else min(holders, key=lambda rank: abs(rank - to))
            shard = None
            if holder == dist.get_rank():
                local = self._mine[joined.names, index]
                shard = local.of(self._read(local.parameter)).detach()
                if holder != to:
                    dist.send(shard.contiguous(), dst=to)
            elif to == dist.get_rank():
                shard = torch.empty(joined.entry.shape, dtype=joined.dtype, device=self.device)
                dist.recv(shard, src=holder)
            if shard is not None and to == dist.get_rank():
                shards.append(shard)
        if shards:
            yield from zip(joined.names, joined.entry.merge(shards), strict=True)


def in_runs(joined: Sequence[Joined], max_bytes: int) -> list[list[Joined]]:
    """Cuts the tensors into runs of one dtype and at most `max_bytes`, or of one parameter."""
    runs: list[list[Joined]] = [[]]
    used = 0
    for one in joined:
        if runs[-1] and (used + one.nbytes > max_bytes or one.dtype != runs[-1][0].dtype):
            runs.append([])
            used = 0
        runs[-1].append(one)
        used += one.nbytes
    return runs
