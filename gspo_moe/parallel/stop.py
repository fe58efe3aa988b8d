"""Ends a run at the same place on every rank: what one rank found ends all of them.

Invariant: ranks that wait for each other in collectives must leave them together, so an error of one rank alone is kept
until the next place where all of them ask. `signals.py` does so with signals.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from gspo_moe.errors import GspoMoeError
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.platform import device

T = TypeVar("T")


class WorkError(RuntimeError):
    """What work of one rank raised that is neither ours nor the system's."""


def raise_everywhere(error: Exception | None) -> None:
    """Raises on every rank what the first of them found, if any did. Collective over all ranks."""
    if not largest(error is not None):
        return
    raise next(each for each in gather_objects(error) if each is not None)


def together(work: Callable[[], T]) -> T:
    """What `work` returns on this rank. Collective over all ranks.

    Where it raises on any, all raise the first one's error: those of this project and of the system, as they are, and a
    WorkError for any other, as not everything can be sent.
    """
    error: Exception | None = None
    try:
        found = work()
    except (GspoMoeError, OSError) as caught:
        error = caught
    except Exception as caught:
        error = WorkError(f"{type(caught).__name__}: {caught}")
        error.add_note(traceback.format_exc())
    raise_everywhere(error)
    return found


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns, or raises as in `together`, on the first rank, which alone does it. Collective."""
    found = [together(lambda: work() if dist.get_rank() == 0 else None)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def largest(value: int) -> int:
    """The largest of all ranks' values. Collective."""
    if dist.get_world_size() == 1:
        return value
    largest = torch.tensor(int(value), device=device().torch_device)  # of one type everywhere: a bool has another size
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
