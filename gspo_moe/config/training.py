"""The sections `parallel`, `optimizer`, `schedule` and `checkpoint`: how the model is trained. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gspo_moe.section import Section


class ParallelConfig(Section):
    """How many ranks share what; data parallelism is what is left of the world.

    check_interval: steps between two looks whether ranks still have the same weights to the bit, 0 for none.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    expert: PositiveInt = 1
    expert_tensor: PositiveInt | None = None
    context: PositiveInt = 1
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    distributed_optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    timeout_minutes: PositiveFloat = 10.0
    check_interval: NonNegativeInt = 10

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallelism inside an expert; megatron-core's default is that of the dense layers."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then constant, cosine or linear decay to `min_lr`.

    max_skipped_updates: in a row, after which the run ends; an update is skipped where loss or gradient is not finite.
    """

    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 1e-4
    min_lr: NonNegativeFloat = 0.0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    warmup_updates: NonNegativeInt = 0
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    clip_grad: NonNegativeFloat = 1.0
    max_skipped_updates: PositiveInt = 10

    def faults(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"optimizer.min_lr={self.min_lr:g} exceeds optimizer.lr={self.lr:g}; lower it to that"


class ScheduleConfig(Section):
    """`steps` RL steps (or supervised batches); a micro-batch packs up to `micro_batch_tokens` tokens.

    exit_after: minutes after its start at which a run saves its last whole step and ends, as at a signal; None: never.
    """

    steps: PositiveInt = 100
    exit_after: PositiveFloat | None = None
    micro_batch_tokens: PositiveInt = 4096
    sft_batch: PositiveInt = 64


class CheckpointConfig(Section):
    """`interval` steps between checkpoints, 0 for only the last; `keep` newest complete ones stay.

    keep: 0 writes none, whatever `interval` is: a run that ends early is lost, and none can be gone on with.
    keep_every: checkpoints of every so many steps stay as well, 0 for none.
    background: writes a copy in host memory while training goes on; the last one is waited for.
    rescue: folder for the last whole step where the run's own takes nothing more; by default RUN_DIR.rescued.
    on_damage: of the newest one: `error` ends the start; `previous` moves it aside and goes on from the one before.
    """

    interval: NonNegativeInt = 0
    keep: NonNegativeInt = 2
    keep_every: NonNegativeInt = 0
    background: bool = False
    rescue: str | None = None
    on_damage: Literal["error", "previous"] = "error"
    export_hf: bool = True

    def faults(self) -> Iterator[str]:
        if self.keep_every and not self.keep:
            yield f"checkpoint.keep_every={self.keep_every} with checkpoint.keep=0, which writes none; raise keep"
        elif self.keep_every and (not self.interval or self.keep_every % self.interval):
            yield (
                f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.interval={self.interval}: "
                "checkpoints that are not written cannot stay; change one"
            )
