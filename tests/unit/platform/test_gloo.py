"""All groups of a process share one gloo device, and work as groups of their own devices do."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.platform.gloo import one_gloo_device
from tests.launch import launch
from tests.qwen3 import layout

RANKS = 4


def devices() -> int:
    """Gloo devices of this process: each polls its sockets, and so does the store, whose server the first rank is."""
    # Listing the folder opens it; that entry is gone when it is read.
    kinds = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if os.path.lexists(file)]
    return kinds.count("anon_inode:[eventpoll]") - (dist.get_rank() == 0)


def run() -> None:
    initialize(layout(RANKS, tensor=2, expert=2), seed=1, timeout_minutes=1.0)
    assert devices() == 1
    with one_gloo_device():
        pairs = [dist.new_group([a, b]) for a in range(RANKS) for b in range(a + 1, RANKS)]
        everyone = [dist.new_group() for _ in range(3)]
    assert devices() == 1
    dist.new_group()
    assert devices() == 2, "a group of torch's own has a device of its own"
    mine = [group for group in pairs if dist.get_rank(group) >= 0]
    assert len(mine) == RANKS - 1
    values = [torch.full((50_000,), float(dist.get_rank() + 1)) for _ in everyone]
    work = [dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, everyone, strict=True)]
    for group in mine:
        total = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(total, group=group)
        assert total.item() == sum(dist.get_process_group_ranks(group))
    for one in work:
        assert one is not None
        one.wait()
    assert all(torch.equal(value, torch.full((50_000,), 10.0)) for value in values)
    shut_down()


def test_groups_of_four_ranks_share_a_device() -> None:
    launch(run, RANKS)
