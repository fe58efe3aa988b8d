"""What this machine offers, and what each absence means."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch

from gspo_moe.errors import ConfigError
from gspo_moe.packages import describe_missing, installation
from gspo_moe.platform.backend import LAYERS, choose_backends, fused_adam, has_nvidia_apex, has_transformer_engine
from gspo_moe.platform.megatron_cpu import ANSWERS, check_megatron_version, megatron_version


def report(kernels: tuple[str, str] | None = None) -> str:
    """One line a part: what was found, and behind the dash what it means; `kernels` is such a line's two halves."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    backend = choose_backends(dict.fromkeys((*LAYERS, "optimizer"), "auto"), "bf16").experts
    adam = fused_adam()
    absent = describe_missing()
    rows = [
        ("gspo_moe", *installation()),
        ("python", platform.python_version(), ""),
        ("device", device, "" if gpu else "no GPU: gloo, megatron-core adapted as listed below, small models only"),
        ("torch", torch.__version__, "" if torch.version.cuda else "CPU build: will not see a GPU"),
        ("megatron-core", *_megatron()),
        (
            "Transformer Engine",
            _version("transformer-engine") if has_transformer_engine() else "absent",
            "" if has_transformer_engine() else "local layers, experts by torch's grouped product",
        ),
        (
            "NVIDIA Apex",
            "found" if has_nvidia_apex() else "absent",
            "" if has_nvidia_apex() else "torch's fused AdamW, unless Transformer Engine brings its own",
        ),
        ("model.backend=auto", backend.name, backend.why),
        (
            "optimizer",
            f"{adam}'s FusedAdam" if adam else "torch's fused AdamW",
            "megatron-core takes Transformer Engine's, else Apex's, else torch's",
        ),
        ("collectives", "nccl" if gpu else "gloo", "between GPUs" if gpu else "between CPU processes"),
        *([("kernels", *kernels)] if kernels else []),
        ("packages", "missing" if absent else "all there", absent),
        ("nvcc", shutil.which("nvcc") or "absent", ""),
        ("Weights & Biases", _version("wandb"), "used only when logging.wandb is set"),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {found}{f' - {meaning}' if meaning else ''}" for name, found, meaning in rows]
    if not gpu:
        lines += ["", "What megatron-core asks of CUDA, and what it gets here:"]
        lines += [f"  {answer.asked} -> {answer.answered}: {answer.reason}" for answer in ANSWERS]
    return "\n".join(lines)


def _megatron() -> tuple[str, str]:
    try:
        version = megatron_version()
    except ConfigError as error:
        return "absent", str(error)
    try:
        check_megatron_version(version)
    except ConfigError as error:
        return version, str(error)
    return version, ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
