"""Routes go from the rank that sampled them to the ranks that train on them, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gspo_moe.errors import TrainingError
from gspo_moe.parallel.exchange import exchange_rows
from gspo_moe.parallel.groups import initialize
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.training.batch import with_routes
from gspo_moe.types import TrainingSample
from tests.launch import launch
from tests.qwen3 import layout

LAYERS, TOPK = 48, 8
LENGTHS = (9, 40, 3, 17, 30, 22)  # tokens of six samples
OWNERS = (0, 0, 0, 1, 1, 1)


def routes_of(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(128, (LENGTHS[number] - 1, LAYERS, TOPK), generator=generator, dtype=torch.uint8)


class Counted:
    """Bytes that collectives of tensors and objects hand this rank."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        all_to_all, gather = dist.all_to_all_single, dist.all_gather

        def exchanged(output: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            self.bytes += output.numel() * output.element_size()
            return all_to_all(output, *arguments, **more)

        def gathered(outputs: list[torch.Tensor], *arguments: Any, **more: Any) -> Any:
            self.bytes += sum(each.numel() * each.element_size() for each in outputs)
            return gather(outputs, *arguments, **more)

        patch.setattr(dist, "all_to_all_single", exchanged)
        patch.setattr(dist.distributed_c10d, "all_gather", gathered)


def samples(rank: int) -> list[TrainingSample]:
    return [
        TrainingSample((1,) * length, (0,) + (1,) * (length - 1), routes=routes_of(i) if OWNERS[i] == rank else None)
        for i, length in enumerate(LENGTHS)
    ]


def _exchange() -> None:
    groups = initialize(layout(2), seed=1)
    rank = groups.data_rank
    patch = pytest.MonkeyPatch()
    counted = Counted(patch)
    wanted = [[0, 4, 2], [3, 1, 5]]
    found = with_routes(samples(rank), wanted, groups)
    for number, sample in enumerate(found):
        assert (sample.routes is not None) == (number in wanted[rank])
        if sample.routes is not None:
            assert torch.equal(sample.routes, routes_of(number))
            assert sample.routes.dtype == torch.uint8
    needed = routes_of(4 if rank == 0 else 1).numel()
    assert needed <= counted.bytes < needed + 2000, "more than this rank trains on"
    whole = sum(routes_of(i).numel() for i in range(len(LENGTHS)))
    counted.bytes = 0
    gather_objects([one for one in samples(rank) if one.routes is not None], groups.data_context)
    assert counted.bytes > whole, "the count sees what a gathering of everything costs"

    counted.bytes = 0
    mine = {i: routes_of(i).short() for i in range(3)} if rank == 0 else {}
    one_sided = exchange_rows(mine, [length - 1 for length in LENGTHS], [[1], [0, 2]], groups.data_context)
    assert {n: rows.dtype for n, rows in one_sided.items()} == dict.fromkeys([[1], [0, 2]][rank], torch.int16)
    assert all(torch.equal(rows, routes_of(n).short()) for n, rows in one_sided.items())
    patch.undo()
    without = [replace(one, routes=None) if i == 5 else one for i, one in enumerate(samples(rank))]
    with pytest.raises(TrainingError, match="sample 5 has no routes"):
        with_routes(without, wanted, groups)


def test_each_rank_gets_the_routes_that_it_trains_on_and_no_others() -> None:
    launch(_exchange, 2)


def _with_context() -> None:
    groups = initialize(layout(2, context=2), seed=1)
    mine = samples(groups.data_context.rank())
    found = with_routes(mine, [list(range(len(LENGTHS)))], groups)
    assert all(one.routes is not None and torch.equal(one.routes, routes_of(i)) for i, one in enumerate(found))


def test_context_ranks_train_on_the_same_samples() -> None:
    launch(_with_context, 2)
