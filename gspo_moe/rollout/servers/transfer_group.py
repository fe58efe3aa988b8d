"""A process group of the trainer's first process and all servers' workers, beside the groups that each has.

Needs torch alone. Made as SGLang, verl and slime make theirs, so that an SGLang server joins it by its own
`/init_weights_update_group`. A member that dies leaves the others waiting, over NCCL for ever, so each waits by a limit
of its own and leaves the group then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world, rendezvous

ROOT = 0  # the trainer


def join_transfer_group(
    address: str, port: int, *, rank: int, world_size: int, name: Any, backend: str, timeout_seconds: float
) -> dist.ProcessGroup:
    """Waits until all `world_size` processes are there. Rank 0 listens. backend: nccl or gloo. name: a string."""
    timeout = timedelta(seconds=timeout_seconds)
    patient = 2 * timeout  # NCCL's own watchdog ends the process
    store, rank, world_size = next(rendezvous(f"tcp://{address}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=patient
    )
    _world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group


def start_broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, root: int) -> dist.Work:
    """root: a rank of this group."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    return group.broadcast([tensor], options)


def await_broadcast(
    work: dist.Work, group: dist.ProcessGroup, seconds: float, broken: Callable[[], bool] = lambda: False
) -> None:
    """Raises RuntimeError, and leaves the group, once it fails, `broken()`, or so many seconds are over."""
    deadline = time.monotonic() + seconds
    try:
        while not work.is_completed():
            if broken() or time.monotonic() > deadline:
                raise RuntimeError(f"a member is gone, or had not taken a bucket after {seconds:g} s")
            time.sleep(0.001)
        work.wait()
    except RuntimeError:
        group.abort()
        raise
