"""Adam's state as whole tensors of the model's parameters: written in one layout, read in any other.

A distributed optimizer keeps a flat piece of each parameter on each data-parallel rank. Here each parameter has one
owner among those ranks, in turn: pieces are put together there before they are written and sent out from there after
reading, one tensor at a time, so that a rank holds its own share of the state once more at most.

megatron-core's own formats cannot do that without Transformer Engine or Apex: `dp_reshardable` reads in the layout
that wrote it only, `fully_sharded_model_space` asks for flattened ranges, which are gone, and `fully_reshardable` takes
values from wrong places behind a padded bucket (tied embeddings over pipeline stages, 0.16.1). Their common part
(parameter groups) differs between one optimizer and a chain of two, as expert parallelism makes; nothing of it is
needed: hyper-parameters are the config's, and Adam's step is one number.

Invariant: what is stored does not depend on whether the optimizer is distributed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from gspo_moe.model.sharded import OPTIMIZER, Shard, with_data

MAIN_WEIGHT = "main_weight"  # fp32, where the model's own is not
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slot:
    """The state of one parameter on this rank.

    tensors: by name, the elements `start` to `stop` of the flattened parameter; empty where this rank has none.
    group: ranks that hold the other pieces, None where this rank holds all. owner: rank in `group`.
    """

    parameter: torch.nn.Parameter
    tensors: dict[str, torch.Tensor]
    start: int = 0
    stop: int = 0
    group: dist.ProcessGroup | None = None
    owner: int = 0

    @property
    def is_mine(self) -> bool:
        return self.group is None or self.group.rank() == self.owner

    @property
    def names(self) -> tuple[str, ...]:
        return MOMENTS if self.parameter.dtype is torch.float32 else (MAIN_WEIGHT, *MOMENTS)

    def whole(self, name: str) -> torch.Tensor | None:
        """The tensor of the parameter's shape, on its owner; None elsewhere. Collective over `group`."""
        if self.group is None:
            return self.tensors[name].view(self.parameter.shape)
        value = torch.zeros(self.parameter.numel(), device=self.parameter.device)
        if self.tensors:
            value[self.start : self.stop] = self.tensors[name]
        dist.reduce(value, dist.get_global_rank(self.group, self.owner), group=self.group)
        return value.view(self.parameter.shape).cpu() if self.is_mine else None

    def room(self, name: str) -> torch.Tensor | None:
        """Where the owner may read the whole tensor into; None elsewhere."""
        if self.group is None:
            return self.tensors[name].view(self.parameter.shape)
        return torch.empty(self.parameter.shape) if self.is_mine else None

    def fill(self, name: str, value: torch.Tensor | None) -> None:
        """Takes this rank's piece of a tensor that its owner brings. Collective over `group`."""
        if self.group is None:
            assert value is not None
            self.tensors[name].copy_(value.view_as(self.tensors[name]))
            return
        if value is None:
            value = torch.empty(self.parameter.shape)
        value = value.to(self.parameter.device)
        dist.broadcast(value, dist.get_global_rank(self.group, self.owner), group=self.group)
        if self.tensors:
            self.tensors[name].copy_(value.flatten()[self.start : self.stop])


@torch.no_grad()
def optimizer_shards(
    parts: list[Any], weights: Mapping[torch.nn.Parameter, Shard], *, loading: bool
) -> dict[str, dict[str, Shard]]:
    """What this rank writes of the state or, with `loading`, reads, for `restore`. Collective.

    parts: megatron-core's optimizers, as in a ChainedOptimizer. weights: `model.sharded.weight_shards`.
    """
    shards: dict[str, dict[str, Shard]] = {}
    for number, slot in enumerate(_slots(parts)):
        for name in slot.names:
            value = slot.room(name) if loading else slot.whole(name)
            if value is not None:
                shards.setdefault(str(number), {})[name] = _shard(slot, name, value, weights[slot.parameter])
    return shards


@torch.no_grad()
def restore(parts: list[Any], found: Mapping[str, Mapping[str, torch.Tensor]], step: int) -> None:
    """Puts what was read for `optimizer_shards` in its place. step: updates that Adam has taken. Collective."""
    for number, slot in enumerate(_slots(parts)):
        for name in slot.names:
            slot.fill(name, found[str(number)][name] if slot.is_mine else None)
    for part in parts:
        _set_step(part.optimizer, step)


def router_gradients(parts: list[Any], weights: Iterable[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    """What this rank has of these weights' reduced gradients, flat: all of each, or its piece of a distributed one."""
    for weight in weights:
        gradient: torch.Tensor = weight.main_grad.flatten()  # type: ignore[attr-defined]
        owners = [part for part in parts if isinstance(part, DistributedOptimizer)]
        if not owners:
            yield gradient
        for part in owners:
            if weight in part.model_param_group_index_map:
                piece = part._get_model_param_range_map(weight)["param"]
                yield gradient[piece.start : piece.end]


def _set_step(adam: torch.optim.Optimizer, step: int) -> None:
    for group in adam.param_groups:
        if not isinstance(adam, torch.optim.AdamW):
            group["step"] = step  # as fused ones count
            continue
        for parameter in group["params"]:
            # A tensor of its own: parameters that share one would all advance it. The fused kernel reads it there.
            adam.state[parameter]["step"] = torch.tensor(float(step), device=parameter.device)


def _shard(slot: _Slot, name: str, value: torch.Tensor, weight: Shard) -> Shard:
    changes: dict[str, Any] = {"key": f"{OPTIMIZER}{name}.{weight.key}"}
    if slot.group is not None:
        # The last number tells data-parallel copies apart, and the owner brings the only one.
        changes["replica_id"] = (*weight.replica_id[:-1], 0)
    return with_data(weight, value, **changes)


def _slots(parts: list[Any]) -> Iterator[_Slot]:
    """Every parameter, in the same order on the ranks that share it."""
    for part in parts:
        if not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)
            _set_step(part.optimizer, 0)
        if isinstance(part, DistributedOptimizer):
            yield from _distributed_slots(part)
        else:
            yield from _whole_slots(part)


def _whole_slots(part: Any) -> Iterator[_Slot]:
    pairs = [(parameter, parameter) for group in part.param_groups for parameter in group["params"]]
    if hasattr(part, "float16_groups"):
        groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        pairs = [pair for models, mains in groups for pair in zip(models, mains, strict=True)]
    for parameter, main in pairs:
        yield _Slot(parameter, _tensors(parameter, main, part.optimizer.state[main]))


def _distributed_slots(part: DistributedOptimizer) -> Iterator[_Slot]:
    group = part.data_parallel_group
    parameters = [parameter for buffer in part.buffers for parameter in buffer.params]
    for number, parameter in enumerate(parameters):
        owner = number % group.size()
        if parameter not in part.model_param_group_index_map:
            yield _Slot(parameter, {}, group=group, owner=owner)
            continue
        index, order = part.model_param_group_index_map[parameter]
        main = part.optimizer.param_groups[index]["params"][order]
        piece = part._get_model_param_range_map(parameter)["param"]
        tensors = _tensors(parameter, main, part.optimizer.state[main])
        yield _Slot(parameter, tensors, piece.start, piece.end, group, owner)


def _tensors(parameter: torch.nn.Parameter, main: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    moments = {name: state[name] for name in MOMENTS}
    return moments if parameter.dtype is torch.float32 else {MAIN_WEIGHT: main.data, **moments}
