"""Whether tensors that several ranks hold alike are alike to the bit: a hash of each, and one collective for all.

Shape letters: R rows and C columns of a tensor, S tensors that more than one rank has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.platform import device

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = torch.iinfo(torch.int64).min  # where a rank does not have the tensor


@dataclass(frozen=True)
class Difference:
    """One tensor that differs: the first element that does, and its value by rank, of all ranks that have it.

    count: of its rows that differ.
    """

    key: str
    index: tuple[int, ...]
    values: Mapping[int, float]
    count: int


def row_hashes(values: torch.Tensor) -> torch.Tensor:
    """int64 [R], where the tensor is: the sum of each row's bits, as integers, modulo 2^64, times an odd number.

    A row is what the last dimension holds. Sums of integers have no order, so that equal bits give equal hashes on any
    device; one flipped bit changes its row's, as an odd multiple of a power of two below 2^64 is not 0.
    """
    bits_RC = values.detach().reshape(-1, values.shape[-1] if values.ndim else 1)
    bits_RC = bits_RC.view(_INTEGERS[values.element_size()])
    return bits_RC.sum(dim=1, dtype=torch.int64) * torch.arange(1, 2 * len(bits_RC), 2, device=values.device)


class SharedTensors:
    """Which of this rank's tensors others have too."""

    def __init__(self, keys: Sequence[str]) -> None:
        """keys: of this rank's tensors; what has the same key must have the same bits. Collective over all ranks."""
        count = Counter(key for of_rank in gather_objects(list(keys)) for key in of_rank)
        shared = sorted(key for key, ranks in count.items() if ranks > 1)
        self._slots = {key: slot for slot, key in enumerate(shared)}

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], Difference | None]:
        """Keys of what differs, and the first of them in detail; the same on every rank. Collective over all ranks.

        tensors: this rank's, by key. One collective, and one wait for the device, where nothing differs.
        """
        mine = [key for key in self._slots if key in tensors]
        if not self._slots:
            return [], None
        hashes = {self._slots[key]: row_hashes(tensors[key]).sum() for key in mine}
        wrong = _differing(hashes, len(self._slots))
        if not wrong:
            return [], None
        names = [list(self._slots)[slot] for slot in wrong]
        return names, _first_difference(names[0], tensors.get(names[0]))


def _differing(hashes: Mapping[int, torch.Tensor], count: int) -> list[int]:
    """Which of `count` places have two values; hashes: this rank's, int64 scalars by place. Collective."""
    # The complement turns the order round, so that one maximum over ranks gives the largest and the smallest.
    extremes_2S = torch.full((2, count), _NOTHING, device=device().torch_device)
    if hashes:
        mine_S = torch.stack(list(hashes.values()))
        extremes_2S[:, list(hashes)] = torch.stack([mine_S, ~mine_S])
    dist.all_reduce(extremes_2S, dist.ReduceOp.MAX)
    found: list[int] = (extremes_2S[0] != ~extremes_2S[1]).nonzero()[:, 0].tolist()
    return found


def _first_difference(key: str, value: torch.Tensor | None) -> Difference:
    """Looks a tensor through that differs, row by row. Collective over all ranks; value: None where it is not."""
    shape = next(shape for shape in gather_objects(None if value is None else tuple(value.shape)) if shape is not None)
    rows_RC = None if value is None else value.detach().reshape(-1, shape[-1])
    hashes = {} if rows_RC is None else dict(enumerate(row_hashes(rows_RC)))
    wrong = _differing(hashes, torch.Size(shape[:-1]).numel())
    row = None if rows_RC is None else rows_RC[wrong[0]].cpu()
    held = {rank: row for rank, row in enumerate(gather_objects(row)) if row is not None}
    bits = torch.stack([row.view(_INTEGERS[row.element_size()]) for row in held.values()])
    column = int((bits != bits[0]).any(dim=0).nonzero()[0, 0])
    index = torch.unravel_index(torch.tensor(wrong[0] * shape[-1] + column), shape)
    values = {rank: float(row[column]) for rank, row in held.items()}
    return Difference(key, tuple(map(int, index)), values, len(wrong))
