"""How much memory this process may still take."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A limit, what is used of it, and what of that is read from files and given up when it runs short.
V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def free_memory(device: str) -> int:
    """Bytes: of the device, or of the machine within this process's cgroups (a container's, Slurm's) and ulimits."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    held = psutil.Process().memory_info()
    limits = ((resource.RLIMIT_DATA, getattr(held, "data", 0)), (resource.RLIMIT_AS, held.vms))
    soft = [(resource.getrlimit(kind)[0], used) for kind, used in limits]
    # Halved, as of such a limit a mapped file takes its part beside the tensors that are made of it.
    own = [(limit - used) // 2 for limit, used in soft if limit != resource.RLIM_INFINITY]
    return max(min([int(psutil.virtual_memory().available), *cgroup_rooms(), *own]), 0)


def cgroup_rooms(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> Iterator[int]:
    """Bytes that each cgroup over this process which has a limit still allows, of version 1 or 2."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, names = (cgroups / "memory", V1) if kinds else (cgroups, V2)
        folder = root / path.lstrip("/")  # as the host calls it, so perhaps not there in a container, whose root is
        for one in (folder, *folder.parents[: len(folder.relative_to(root).parts)]):
            if (room := _room(one, *names)) is not None:
                yield room


def _room(folder: Path, limit: str, used: str, kept: tuple[str, ...]) -> int | None:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = sum(int(value) for name, value in lines if name in kept)
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - now + files
