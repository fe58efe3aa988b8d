"""What each tensor of this rank is called over all ranks, so that those who hold the same find each other."""

from __future__ import annotations

import torch

from gspo_moe.model.build import Model
from gspo_moe.model.sharded import stored, weight_shards


def named_over_ranks(model: Model) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by a name that another rank has for a parameter of the same values, and no other.

    That is where a checkpoint stores it: the same for data-parallel replicas, for what tensor or expert ranks have
    whole (norms, routers), and for an embedding that the first pipeline stage shares with the last one.
    """
    found, shards = {}, weight_shards(model)
    for parameter, shard in shards.items():
        first = stored(shard)[0]
        offset = list(first.global_offset)
        name = first.key
        if ".layers." in name and first.prepend_axis_num:
            name = name.replace(".layers.", f".layers.{offset.pop(0)}.")
        found[name + (f" from {offset}" if any(offset) else "")] = parameter
    assert len(found) == len(shards), "two parameters of one name"
    return found
