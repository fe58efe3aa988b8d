"""Which device this process runs on, decided once."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from functools import cache

import torch

from gspo_moe.platform.allocator import keep_freed_memory


@dataclass(frozen=True)
class Device:
    """kind: `cuda` or `cpu`. torch_device: where tensors live. backend: torch.distributed's for that device."""

    kind: str
    torch_device: torch.device
    backend: str

    def synchronize(self) -> None:
        """Waits for queued device work, so that wall-clock times are honest."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def peak_memory_gib(self) -> float:
        """Peak memory allocated on the device so far, in GiB; 0 on CPU, where `peak_rss_gib` tells."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.kind == "cuda" else 0.0

    def total_memory_gib(self) -> float:
        """Memory of the device, in GiB; 0 on CPU."""
        return torch.cuda.get_device_properties(self.torch_device).total_memory / 2**30 if self.kind == "cuda" else 0.0


@cache
def device() -> Device:
    """The GPU of this process's LOCAL_RANK where there is one, else the CPU."""
    if not torch.cuda.is_available():
        keep_freed_memory()
        return Device("cpu", torch.device("cpu"), "gloo")
    # Read at the first matrix product; without it those raise under torch.use_deterministic_algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(local)
    return Device("cuda", local, "nccl")


def peak_rss_gib() -> float:
    """Peak resident memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
