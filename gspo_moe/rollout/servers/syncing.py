"""What every way of giving servers new weights shares: one process speaks to them, all learn how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from gspo_moe.errors import RolloutError
from gspo_moe.rollout.servers.records import Dialect, Servers

T = TypeVar("T")

MAIN = 0


def on_main(action: Callable[[], T]) -> T:
    """What `action` gives on the first rank, on every rank; its RolloutError is raised on every rank. Collective."""
    outcome: list[tuple[T | None, RolloutError | None]] = [(None, None)]
    if dist.get_rank() == MAIN:
        try:
            outcome = [(action(), None)]
        except RolloutError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=MAIN)
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def load_everywhere(servers: Servers, dialect: Dialect, folder: str, version: int) -> None:
    """Has paused servers take a folder's weights. Not collective."""
    for post in dialect.load_folder(folder, version):
        servers.everywhere(post)
