"""Rows that one rank has and others need, sent to those alone. Shape letters: R bytes of all rows end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.platform import device


@dataclass(frozen=True)
class _Held:
    """What a rank has. row: dtype and shape of each item behind its rows; None where it has nothing."""

    items: tuple[int, ...]
    row: tuple[torch.dtype, tuple[int, ...]] | None


def exchange_rows(
    mine: Mapping[int, torch.Tensor], lengths: Sequence[int], wanted: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> dict[int, torch.Tensor]:
    """The items [length, ...] that this rank wants, on the CPU, as far as any rank has them. Collective over `group`.

    mine: the items that this rank has, by number, of one dtype and one shape behind the rows on all ranks. lengths: of
    all items. wanted: by rank, the numbers of the items that it wants; the same on every rank, as are lengths.
    No row goes to a rank that does not want it.
    """
    here = group.rank()
    held: list[_Held] = gather_objects(_held(mine), group)
    owner = {number: rank for rank, each in reversed(list(enumerate(held))) for number in each.items}
    kept = {number: mine[number] for number in wanted[here] if owner.get(number) == here}
    if all(owner.get(number, rank) == rank for rank, numbers in enumerate(wanted) for number in numbers):
        return kept
    dtype, shape = next(each.row for each in held if each.row is not None)
    none = torch.empty((0, *shape), dtype=dtype)
    sent = [
        torch.cat([none, *(mine[n].cpu() for n in numbers if rank != here and owner.get(n) == here)])
        for rank, numbers in enumerate(wanted)
    ]
    numbers = [n for rank in range(len(held)) if rank != here for n in wanted[here] if owner.get(n) == rank]
    row_bytes = none.new_empty(shape).numel() * none.element_size()
    counts = [sum(lengths[n] for n in numbers if owner[n] == rank) * row_bytes for rank in range(len(held))]
    received_R = _all_to_all([rows.view(-1).view(torch.uint8) for rows in sent], counts, group)
    rows = received_R.view(-1, row_bytes).view(dtype).view(-1, *shape)
    return kept | dict(zip(numbers, rows.split([lengths[n] for n in numbers]), strict=True))


def _held(mine: Mapping[int, torch.Tensor]) -> _Held:
    one: Any = next(iter(mine.values()), None)
    return _Held(tuple(mine), None if one is None else (one.dtype, tuple(one.shape[1:])))


def _all_to_all(sent: Sequence[torch.Tensor], received: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    place = device().torch_device
    result = torch.empty(sum(received), dtype=torch.uint8, device=place)
    lengths = [len(each) for each in sent]
    dist.all_to_all_single(result, torch.cat(list(sent)).to(place), list(received), lengths, group=group)
    return result.cpu()
