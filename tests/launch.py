"""Runs a function in several fresh processes that talk over gloo, as torchrun would start them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds of what ranks import. The last is needed where a process joins a second group.
PRELOADED = ["pytest", "gspo_moe.training.rl", "gspo_moe.training.checkpoint", "torch._dynamo.config"]


def launch(function: Callable[..., None], world_size: int, *args: Any, seconds: float = 600.0) -> None:
    """Calls `function(*args)` on each of `world_size` ranks; `function` stands at the top of its module.

    Ranks are forks of a process that has imported much and run nothing; CUDA, once asked for, allows no fork. So they
    share a hash seed, unlike a job's: what goes wrong where ranks order a set otherwise, test_layouts shows.
    Raises the first failing rank's error with its stack trace, and TimeoutError after `seconds`.
    """
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = mp.start_processes(
        _rank,
        args=(world_size, dict(os.environ), free_port(), function, args),
        nprocs=world_size,
        join=False,
        start_method=method,
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
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many beside each other, below those that systems give to connections."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _rank(
    rank: int,
    world_size: int,
    environment: dict[str, str],
    port: int,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    function(*args)
