"""megatron-core's optimizer and learning-rate schedule for a model, and the wrapping that its gradients need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.router import freeze_routers
from gspo_moe.model.sharded import Shard
from gspo_moe.platform import adam_of, device, use_torch_kernels
from gspo_moe.routing.prediction import Lesson
from gspo_moe.routing.recorder import routers_of
from gspo_moe.training.optimizer_state import optimizer_shards, restore, router_gradients
from gspo_moe.training.predictor import Predictor, PredictorSums


@dataclass(frozen=True)
class UpdateResult:
    """grad_norm: before clipping, over all ranks. learning_rate: of this update. skipped: it or the loss not finite.

    router_grad_norm: the part of grad_norm that is the routers', under Routing Replay; None without, or where they are
    frozen. predictor: what predictors of routes were taught, over all ranks; None where nothing.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool
    router_grad_norm: float | None = None
    predictor: PredictorSums | None = None


class Optimizer:
    """AdamW over all chunks of a model, with its schedule. One `update` is one optimizer step.

    predictor: what `routing.replay=predict` foretells routes with; None without.
    adam_steps: updates so far that were not skipped. skipped_in_a_row: the latest updates, all of which were.
    lr_factor: of the schedule's learning rates, from the next move of the schedule on.
    """

    def __init__(self, config: Config, model: Model, total_updates: int) -> None:
        if config.routing.frozen_router:
            freeze_routers(model.chunks)
        self._wrapped = _wrap(config, model)
        self.adam_steps = 0
        self.skipped_in_a_row = 0
        self.lr_factor = 1.0
        self._groups = model.groups
        self._distributed = config.parallel.distributed_optimizer
        self._watched = _router_weights(config, model)
        self.predictor = Predictor(config, model) if config.routing.replay == "predict" else None
        settings = config.optimizer
        with adam_of(config.model.backend.optimizer):
            self.megatron: Any = get_megatron_optimizer(_settings(config, model), model.chunks)
        use_torch_kernels(part.optimizer for part in self.megatron.chained_optimizers)
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
        self._move_schedule(self._ahead)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.megatron.scale_loss

    def shards(self, weights: Mapping[torch.nn.Parameter, Shard], *, loading: bool) -> dict[str, dict[str, Shard]]:
        """Adam's state, to be written or, with `loading`, read for `restore`; weights: `weight_shards`. Collective."""
        found = optimizer_shards(self.megatron.chained_optimizers, weights, loading=loading)
        return found if self.predictor is None else found | self.predictor.shards(weights)

    def restore(
        self, found: Mapping[str, Mapping[str, torch.Tensor]], adam_steps: int, updates: int, predictor_steps: int = 0
    ) -> None:
        """Goes on after `updates` updates, `adam_steps` of which were not skipped; settings stay the config's own."""
        restore(self.megatron.chained_optimizers, found, adam_steps)
        if self.predictor is not None:
            self.predictor.restore(found, predictor_steps)
        self.adam_steps, self.skipped_in_a_row = adam_steps, 0
        self.scheduler.num_steps = 0
        self._move_schedule(updates + self._ahead)

    @property
    def updates(self) -> int:
        """Updates so far, skipped ones too."""
        return int(self.scheduler.num_steps) - self._ahead

    def is_finite(self) -> bool:
        """Whether this rank's part of Adam's state, with the weights that it steps, holds neither NaN nor infinity."""
        optimizers = [each.optimizer for each in self.megatron.chained_optimizers if each.optimizer is not None]
        weights = [weight for each in optimizers for group in each.param_groups for weight in group["params"]]
        optimizers += [] if self.predictor is None else [self.predictor.adam]
        weights += [] if self.predictor is None else self.predictor.weights
        found = [each for one in optimizers for each in one.state.values()]
        state = [value for each in found for name, value in each.items() if name != "step"]  # which may lie elsewhere
        tensors = [value for value in (*weights, *state) if isinstance(value, torch.Tensor)]
        return not tensors or bool(torch.stack([value.isfinite().all() for value in tensors]).all())

    def zero_grad(self) -> None:
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def update(self, *, finite: bool = True, lesson: Lesson | None = None) -> UpdateResult:
        """Takes one step with the gradients at hand, or none where one is not finite; the schedule moves on.

        finite: whether the loss, log-probs and ratios that they come from are; the same on every rank.
        lesson: what the predictors learn from, by a step at the same learning rate times theirs.
        """
        learning_rate = float(self.megatron.param_groups[0]["lr"])
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        router_grad_norm = self._router_grad_norm() if self._watched is not None else None
        finite = finite and math.isfinite(grad_norm)
        if finite:
            # megatron-core's `step`, which would take the gradients and their norm once more.
            self._clip(grad_norm)
            self.megatron.step_with_ready_grads()
            self.adam_steps += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self._move_schedule(1)
        taught = None
        if lesson is not None and finite:
            assert self.predictor is not None
            taught = self.predictor.learn(lesson, learning_rate)
        return UpdateResult(grad_norm, learning_rate, not finite, router_grad_norm, taught)

    def _router_grad_norm(self) -> float:
        """Routers are alike on tensor and expert ranks, pieces lie over the others. Collective."""
        squares = torch.zeros((), dtype=torch.float64, device=device().torch_device)
        for gradient in router_gradients(self.megatron.chained_optimizers, self._watched or ()):
            squares += gradient.double().square().sum()
        for group in (self._groups.data_context if self._distributed else None, self._groups.pipeline):
            if group is not None and group.size() > 1:
                dist.all_reduce(squares, group=group)
        return math.sqrt(squares.item())

    def _move_schedule(self, updates: int) -> None:
        self.scheduler.step(increment=updates)
        for group in self.megatron.param_groups:
            group["lr"] *= self.lr_factor

    def _clip(self, grad_norm: float) -> None:
        for part in self.megatron.chained_optimizers:
            parameters = part.get_parameters() if part.optimizer is not None else []
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)


def _router_weights(config: Config, model: Model) -> list[torch.nn.Parameter] | None:
    if config.routing.replay == "none" or config.routing.frozen_router:
        return None
    return [weight for router in routers_of(model.chunks) for weight in router.parameters()]


def _settings(config: Config, model: Model) -> OptimizerConfig:
    settings = config.optimizer
    return OptimizerConfig(
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
    )


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
