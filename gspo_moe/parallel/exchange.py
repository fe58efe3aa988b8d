"""Rows that one rank has and others need, sent to those alone.

Shape letters: R rows of all items end to end, F bytes a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_moe.platform import device


@dataclass(frozen=True)
class Rows:
    """One item's place in an exchange. owner: the rank of the group that has it. length: its rows."""

    owner: int
    length: int


def exchange_rows(
    mine: Mapping[int, torch.Tensor], items: Sequence[Rows], wanted: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> dict[int, torch.Tensor]:
    """The items [length, ...] that this rank wants, on the CPU, from the ranks that own them. Collective over `group`.

    mine: the items that this rank owns, by number, of one dtype and one shape behind the rows on all ranks. items: all
    of them. wanted: by rank, the numbers of the items that it wants; every rank passes the same `items` and `wanted`.
    No byte goes to a rank that does not want it.
    """
    here = group.rank()
    kept = {number: mine[number] for number in wanted[here] if items[number].owner == here}
    if all(items[number].owner == rank for rank, numbers in enumerate(wanted) for number in numbers):
        return kept
    like = _like(mine, group)
    outgoing = [[] if rank == here else [n for n in numbers if n in mine] for rank, numbers in enumerate(wanted)]
    incoming = [
        [] if owner == here else [n for n in wanted[here] if items[n].owner == owner] for owner in range(group.size())
    ]
    row_bytes = like[0].numel() * like.element_size()
    sent = [torch.cat([like[:0], *(mine[n].cpu() for n in numbers)]) for numbers in outgoing]
    received_R = _all_to_all([_as_bytes(rows) for rows in sent], _bytes(incoming, items, row_bytes), group)
    numbers = [number for each in incoming for number in each]
    rows = received_R.view(-1, row_bytes).view(like.dtype).view(-1, *like.shape[1:])
    return kept | dict(zip(numbers, rows.split([items[n].length for n in numbers]), strict=True))


def _like(mine: Mapping[int, torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """One row of zeros such as every item has; a rank may own none."""
    found: list[tuple[torch.dtype, tuple[int, ...]] | None] = [None] * group.size()
    own = next(iter(mine.values()), None)
    dist.all_gather_object(found, None if own is None else (own.dtype, tuple(own.shape[1:])), group=group)
    dtype, shape = next(each for each in found if each is not None)
    return torch.zeros((1, *shape), dtype=dtype)


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(-1).view(torch.uint8)


def _bytes(numbers: Sequence[Sequence[int]], items: Sequence[Rows], row_bytes: int) -> list[int]:
    return [row_bytes * sum(items[number].length for number in each) for each in numbers]


def _all_to_all(sent: Sequence[torch.Tensor], received: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    place = device().torch_device
    result = torch.empty(sum(received), dtype=torch.uint8, device=place)
    lengths = [len(each) for each in sent]
    dist.all_to_all_single(result, torch.cat(list(sent)).to(place), list(received), lengths, group=group)
    return result.cpu()
