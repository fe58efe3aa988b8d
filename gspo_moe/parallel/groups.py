"""Process groups, built once per process and passed on. The only module that sets megatron-core's global state up."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_moe.config.layout import Layout
from gspo_moe.platform import device, prepare_megatron
from gspo_moe.platform.gloo import forget_gloo_device, one_gloo_device

prepare_megatron()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402


@dataclass(frozen=True)
class Groups:
    """Who this process is and whom it talks to.

    data: ranks that hold the same weights' shard and see other sequences (context parallelism not counted in).
    data_context: ranks that hold the same weights' shard and see other tokens.
    model: ranks that together hold one copy of the weights (tensor x pipeline).
    experts: ranks that together hold one copy of a stage's experts (expert x expert tensor).
    tensor, pipeline, expert, context: as in megatron-core.
    """

    layout: Layout
    rank: int
    world_size: int
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup
    model: dist.ProcessGroup
    experts: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    expert: dist.ProcessGroup
    context: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and shows progress."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_global_rank(self.pipeline, self.pipeline.size() - 1)


def world_size_from_environment() -> int:
    """Processes of this job: torchrun's WORLD_SIZE, or 1 for a plain start."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(layout: Layout, seed: int, timeout_minutes: float = 10.0) -> Groups:
    """Joins the job, unless this process has, and builds megatron-core's groups for `layout`; `seed` feeds its RNGs."""
    with one_gloo_device():
        if not dist.is_initialized():
            _join(datetime.timedelta(minutes=timeout_minutes))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            distributed_timeout_minutes=int(max(1, timeout_minutes)),
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return Groups(
        layout=layout,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model=parallel_state.get_model_parallel_group(),
        experts=parallel_state.get_expert_tensor_and_model_parallel_group(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
    )


def _join(timeout: datetime.timedelta) -> None:
    here = device()
    if "RANK" in os.environ:
        dist.init_process_group(here.backend, timeout=timeout)
    else:
        dist.init_process_group(here.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def leave_layout() -> None:
    """Takes down the groups of one layout and stays in the job; `initialize` may build another layout's."""
    parallel_state.destroy_model_parallel()


def shut_down() -> None:
    """Takes the groups down; without it gloo's threads sometimes abort a process that is about to end well.

    Before another `initialize` the ranks need a new MASTER_PORT: the old store stays.
    """
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_gloo_device()
