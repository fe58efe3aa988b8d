"""megatron-core's optimizer and learning-rate schedule for a model, and the wrapping that its gradients need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model

STATE = ("params", "step")  # what is state, not setting, in a parameter group
# Each data-parallel rank writes and reads its own shards; megatron-core refuses to write its default format.
SHARDING = {"distrib_optim_sharding_type": "dp_reshardable"}


@dataclass(frozen=True)
class UpdateResult:
    """grad_norm: before clipping, over all ranks. learning_rate: of this update. skipped: a gradient was not finite."""

    grad_norm: float
    learning_rate: float
    skipped: bool


class Optimizer:
    """AdamW over all chunks of a model, with its schedule. One `update` is one optimizer step."""

    def __init__(self, config: Config, model: Model, total_updates: int) -> None:
        self._wrapped = _wrap(config, model)
        settings = config.optimizer
        self.megatron: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                weight_decay=settings.weight_decay,
                clip_grad=settings.clip_grad,
                bf16=config.model.dtype == "bf16",
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=config.parallel.distributed_optimizer,
            ),
            model.chunks,
        )
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_updates,
            lr_decay_steps=max(total_updates, settings.warmup_updates + 1),
            lr_decay_style=settings.decay,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        # The scheduler's first value belongs to update 0; with warm-up that would be a learning rate of zero.
        self._ahead = 1 if settings.warmup_updates else 0
        self.scheduler.step(increment=self._ahead)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.megatron.scale_loss

    @torch.no_grad()
    def load(self, state: dict[str, Any], updates: int) -> None:
        """Goes on after `updates` updates from megatron-core's optimizer state; all settings stay the config's own."""
        # Before loading: megatron-core 0.19 finds a parameter group by its settings, learning rates included.
        for group, own in zip(_groups(state), self.megatron.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name not in STATE})
        self.megatron.load_state_dict(state)
        for part in self._distributed():
            _restore_steps(part)
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=updates + self._ahead)

    def sharded_state(self, model_shards: dict[str, Any], *, loading: bool) -> Any:
        """megatron-core's optimizer state, to be saved or, with `loading`, to be filled, cut along `model_shards`."""
        if loading:
            for part in self._distributed():
                if not part.optimizer.state:
                    part._init_optimizer_states_with_dummy_values()
        return self.megatron.sharded_state_dict(model_shards, is_loading=loading, metadata=SHARDING)

    def _distributed(self) -> list[DistributedOptimizer]:
        return [part for part in self.megatron.chained_optimizers if isinstance(part, DistributedOptimizer)]

    def zero_grad(self) -> None:
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def update(self) -> UpdateResult:
        """Takes one step with the gradients at hand, or none where one is not finite; the schedule moves on."""
        learning_rate = float(self.megatron.param_groups[0]["lr"])
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        finite = math.isfinite(grad_norm)
        if finite:
            self.megatron.step()
        self.scheduler.step(increment=1)
        return UpdateResult(grad_norm, learning_rate, skipped=not finite)


def _groups(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The parameter groups in megatron-core's optimizer state, which numbers its optimizers where it has several."""
    parts = [state[number] for number in sorted(state)] if 0 in state else [state]
    return [group for part in parts for group in part.get("optimizer", part)["param_groups"]]


def _restore_steps(part: DistributedOptimizer) -> None:
    # Loading leaves torch's Adam one `step` tensor for all parameters, and an old value in it.
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            if "step" in state:
                state["step"] = torch.tensor(float(group["step"]))


def _wrap(config: Config, model: Model) -> list[DistributedDataParallel]:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    chunks: list[DistributedDataParallel] = []
    for index, chunk in enumerate(model.chunks):
        inner = Float16Module(model.config, chunk) if config.model.dtype == "bf16" else chunk
        chunks.append(DistributedDataParallel(model.config, ddp, inner, disable_bucketing=index > 0))
    model.chunks = list(chunks)
    for chunk in chunks:
        chunk.broadcast_params()
    model.config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks
