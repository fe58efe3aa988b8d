"""What a run was started with: versions, machine, layout and date, a line of starts.jsonl each time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from gspo_moe import __version__
from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.observability.jsonl import JsonLines
from gspo_moe.observability.reader import STARTS_FILE

# Distributions whose versions change a run's numbers or speed; one that is absent is left out.
DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "tokenizers", "transformers")


def write_start(run_dir: str | Path, step: int, layout: Layout, architecture: Architecture, world_size: int) -> None:
    """Appends this start to `run_dir`/starts.jsonl. step: of the checkpoint that the run goes on from, 0 for a new run.

    Starts of an earlier attempt that the checkpoint does not know vanish, as their metrics do.
    """
    lines = JsonLines(Path(run_dir) / STARTS_FILE, step)
    lines.append(
        {
            "step": step,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "device": device_name(),
            "world_size": world_size,
            "layout": asdict(layout),
            "architecture": architecture.model_dump(mode="json"),
            "parameters": architecture.num_parameters,
            "active_parameters": architecture.num_active_parameters,
            "versions": versions(),
        }
    )
    lines.close()


def versions() -> dict[str, str]:
    """Of this project, Python, CUDA where torch has it, and `DISTRIBUTIONS`."""
    found: dict[str, Any] = {"gspo_moe": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.version.cuda
    return {**found, "cuda": cuda} if cuda else found


def device_name() -> str:
    """The GPU, or the CPU with the threads that this process uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores), threads a process: {torch.get_num_threads()}"
