"""Collectives of equal parts by their names of torch 2.13; before, torch has them under others."""

import torch
import torch.distributed as dist

_RENAMED = hasattr(dist, "all_gather_single")


def all_gather_single(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's part, in the order of the ranks, into `whole`."""
    gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
    gather(whole, part, group=group)


def reduce_scatter_single(part: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> None:
    """The sum over ranks of this rank's part of `whole`, into `part`."""
    scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor
    scatter(part, whole, group=group)
