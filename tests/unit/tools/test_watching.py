"""tools/watching.py: what it counts of a process's messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tools.watching import Messages, count_messages


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """This process as the first of two, whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_bytes_are_those_that_this_process_sends(one_of_two: None) -> None:
    alone = dist.new_group([0])

    def step() -> None:
        dist.all_reduce(torch.zeros(3))
        dist.all_gather([torch.zeros(5), torch.zeros(5)], torch.zeros(5))
        dist.all_to_all_single(torch.zeros(6, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8), [3, 3], [8, 2])
        dist.send(torch.zeros(2, dtype=torch.float64), dst=1)
        dist.recv(torch.zeros(100), src=1)
        dist.all_reduce(torch.zeros(100), group=alone)

    assert count_messages(step) == Messages(messages=4, sent_bytes=12 + 20 + 10 + 16)
    before = dist.ProcessGroup.allreduce
    with pytest.raises(ZeroDivisionError):
        count_messages(lambda: 1 // 0)
    assert dist.ProcessGroup.allreduce is before
