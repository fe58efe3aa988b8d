"""What a run is, in a few lines at its start: device, layout, model, versions, kernels, and where it goes on."""

from __future__ import annotations

import shutil

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.observability.starts import device_name
from gspo_moe.observability.summary import short_count
from gspo_moe.packages import installation
from gspo_moe.platform import megatron_version


def describe_device(processes: int) -> str:
    """Of `processes` processes, as of this one."""
    unseen = torch.version.cuda is None and shutil.which("nvidia-smi") is not None
    why = "; torch is a CPU build and sees no GPU: run bash launch/install.sh on this machine" if unseen else ""
    return f"{processes} x {device_name()}{why}"


def describe_layout(layout: Layout) -> str:
    """Every size above 1, data parallelism always."""
    sizes = {
        "data": layout.data,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline or 1,
        "context": layout.context,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
        "expert_data": layout.expert_data,
    }
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")


def describe_model(config: Config, architecture: Architecture) -> str:
    """Its parameters in all and those that a token meets."""
    total, active = short_count(architecture.num_parameters), short_count(architecture.num_active_parameters)
    return f"{total} parameters, {active} active, {config.model.dtype}"


def header_rows(
    config: Config, layout: Layout, architecture: Architecture, *, processes: int, kernels: str, step: int
) -> list[tuple[str, str]]:
    """A label and a text each. kernels: those in use, in words. step: how many steps are done."""
    steps, what = config.schedule.steps, config.algorithm.name if config.stage == "rl" else config.stage
    todo = f"steps {step + 1} to {steps}" if step < steps else f"after step {step}"
    return [
        ("run", f"{config.run_path}, {todo} of {what}, {config.task.name}"),
        ("model", describe_model(config, architecture)),
        ("device", describe_device(processes)),
        ("layout", describe_layout(layout)),
        ("kernels", kernels),
        ("versions", f"gspo_moe {installation()[0]}, torch {torch.__version__}, megatron-core {megatron_version()}"),
    ]
