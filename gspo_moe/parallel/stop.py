"""Ends a run at the same place on every rank: what one rank found ends all of them.

Invariant: ranks that wait for each other in collectives must leave them together, so an error of one rank alone is kept
until the next place where all of them ask. `signals.py` does so with signals.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from gspo_moe.errors import GspoMoeError
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.platform import device


def raise_everywhere(error: GspoMoeError | None) -> None:
    """Raises on every rank what the first of them found, if any did. Collective over all ranks."""
    if not largest(error is not None):
        return
    raise next(each for each in gather_objects(error) if each is not None)


def largest(value: int) -> int:
    """The largest of all ranks' values. Collective."""
    if dist.get_world_size() == 1:
        return value
    largest = torch.tensor(value, device=device().torch_device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
