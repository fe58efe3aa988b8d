"""Whose layers the model is made of, decided in one place from what this machine has."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from gspo_moe.errors import ConfigError
from gspo_moe.platform.megatron_cpu import prepare_megatron


@dataclass(frozen=True)
class Backend:
    """name: `local` means megatron-core's own layers. why: one line for a person."""

    name: Literal["local", "transformer_engine"]
    why: str


def choose_backend(wanted: str, dtype: str) -> Backend:
    """The backend for a config's `model.backend` and `model.dtype` on this machine.

    Raises ConfigError where Transformer Engine is asked for and cannot run.
    """
    if wanted == "local":
        return Backend("local", "model.backend=local")
    obstacle = _obstacle(dtype)
    if obstacle is None:
        return Backend("transformer_engine", f"a GPU, Transformer Engine and model.dtype={dtype}")
    if wanted == "transformer_engine":
        raise ConfigError(f"model.backend=transformer_engine cannot run here: {obstacle}, or set model.backend=local")
    return Backend("local", obstacle)


def _obstacle(dtype: str) -> str | None:
    """What keeps Transformer Engine from being used, with the fix."""
    if not torch.cuda.is_available():
        return "torch finds no GPU, which Transformer Engine needs; use a machine that has one"
    if dtype == "fp32":
        return (
            "Transformer Engine multiplies fp32 matrices in TF32 and its fused attention takes 16 bits only; "
            "set model.dtype=bf16"
        )
    if not has_transformer_engine():
        return "Transformer Engine is not installed; run `pip install --no-build-isolation transformer-engine[pytorch]`"
    prepare_megatron()
    from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelGroupedLinear

    if not HAVE_TE or TEColumnParallelGroupedLinear is None:
        return (
            "the installed Transformer Engine does not import, or is older than 1.9; see what "
            "`python -c 'import transformer_engine.pytorch'` says and install one that fits this torch and CUDA"
        )
    return None


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def has_nvidia_apex() -> bool:
    """True for NVIDIA's Apex, which is built from source; the package of that name on PyPI is something else."""
    return importlib.util.find_spec("amp_C") is not None and importlib.util.find_spec("apex") is not None


def fused_adam() -> str | None:
    """Whose fused Adam megatron-core takes: the first that imports; None where it takes torch's AdamW."""
    for module, owner in (("transformer_engine.pytorch.optimizers", "Transformer Engine"), ("apex.optimizers", "Apex")):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return owner
    return None
