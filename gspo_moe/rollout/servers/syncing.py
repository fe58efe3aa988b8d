"""What every way of giving servers new weights shares: one process speaks to them, all learn how it went."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch.distributed as dist

from gspo_moe.parallel import stop
from gspo_moe.parallel.stop import largest
from gspo_moe.rollout.servers.records import Dialect, Servers

T = TypeVar("T")

MAIN = 0
LOOK_SECONDS = 1.0


def on_main(action: Callable[[], T]) -> T:
    """What `action` gives on the first rank, on every rank; what it raises is raised on every rank. Collective.

    The others look every second whether it is done, so that it may take longer than a collective may.
    """
    if dist.get_world_size() == 1:
        return action()
    if dist.get_rank() != MAIN:
        while not largest(0):
            pass
        return stop.on_main(action)
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(action)
        while not wait([future], LOOK_SECONDS).done:
            largest(0)
    largest(1)
    return stop.on_main(future.result)


def load_everywhere(servers: Servers, dialect: Dialect, folder: str, version: int) -> None:
    """Has paused servers take a folder's weights. Not collective."""
    for post in dialect.load_folder(folder, version):
        servers.everywhere(post)
