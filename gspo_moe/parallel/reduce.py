"""Statistics and small objects over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from gspo_moe.algorithms.statistics import Mergeable, at_once
from gspo_moe.platform import device

if TYPE_CHECKING:
    from gspo_moe.parallel.groups import Groups

S = TypeVar("S", bound=Mergeable)


def reduce_statistics(statistics: S, group: dist.ProcessGroup) -> S:
    """The statistics of all ranks of `group` together: one collective for the sums, one for the maxima."""

    def total(op: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduced(flat: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(flat, op, group=group)
            return flat

        return reduced

    return type(statistics)(
        at_once(statistics.sums, total(dist.ReduceOp.SUM)), at_once(statistics.maxima, total(dist.ReduceOp.MAX))
    )


def from_last_stage(value: Any, groups: Groups) -> Any:
    """What the last stage of this rank's pipeline holds, on all of its stages."""
    if groups.pipeline.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, groups.last_stage_rank, group=groups.pipeline)
    return box[0]


def gather_over_data(value: Any, groups: Groups) -> list[Any]:
    """Each data-parallel rank's value, in the order of their ranks, on every rank."""
    return gather_objects(value, groups.data)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Each rank's value, in the order of the group's ranks (default: all), on every one of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def most(count: int, group: dist.ProcessGroup) -> int:
    """The largest `count` over the ranks of `group`."""
    if group.size() == 1:
        return count
    value = torch.tensor(count, device=device().torch_device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return int(value)
