"""Runs a function in several fresh processes that talk over gloo, as torchrun would start them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(function: Callable[..., None], world_size: int, *args: Any, seconds: float = 300.0) -> None:
    """Calls `function(*args)` on each of `world_size` ranks; `function` stands at the top of its module.

    Raises the first failing rank's error with its stack trace, and TimeoutError after `seconds`.
    """
    context = mp.start_processes(
        _rank, args=(world_size, free_port(), function, args), nprocs=world_size, join=False, start_method="spawn"
    )
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} still runs on {world_size} ranks after {seconds} s")
    finally:
        for process in context.processes:
            process.kill()


def renew_port() -> None:
    """Lets every rank take down its process group and join another: the old store would answer with old addresses."""
    port = [free_port()]
    dist.broadcast_object_list(port, src=0)
    os.environ["MASTER_PORT"] = str(port[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports(count: int) -> int:
    """The first of so many beside each other, below those that systems give to connections."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    function(*args)
