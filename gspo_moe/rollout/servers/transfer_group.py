"""A process group of the trainer's first process and all servers' workers, beside the groups that each has.

Needs torch alone. Made as SGLang, verl and slime make theirs, so that an SGLang server joins it by its own
`/init_weights_update_group`.
"""

from __future__ import annotations

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
    store, rank, world_size = next(rendezvous(f"tcp://{address}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group


def start_broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, root: int) -> dist.Work:
    """root: a rank of this group."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    return group.broadcast([tensor], options)
