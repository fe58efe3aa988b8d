"""What every way of giving servers new weights shares: one process speaks to them, all learn how it went."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch.distributed as dist

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
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == MAIN:
        with ThreadPoolExecutor(max_workers=1) as thread:
            future = thread.submit(action)
            while not wait([future], LOOK_SECONDS).done:
                largest(0)
            failure = future.exception()
            if failure is not None and not isinstance(failure, Exception):
                raise failure
            outcome = [(None, failure) if failure else (future.result(), None)]
        largest(1)
    else:
        while not largest(0):
            pass
    dist.broadcast_object_list(outcome, src=MAIN)
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def load_everywhere(servers: Servers, dialect: Dialect, folder: str, version: int) -> None:
    """Has paused servers take a folder's weights. Not collective."""
    for post in dialect.load_folder(folder, version):
        servers.everywhere(post)
