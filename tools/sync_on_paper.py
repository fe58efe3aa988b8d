"""How long giving servers new weights takes on paper: bytes over bandwidth, and a fixed cost a tensor. Nothing is run.

    python tools/sync_on_paper.py [--servers 4] [--disk 20] [--network 45] [--nvlink 360] [--tensor 100]

Prints a table in Markdown, for docs/weight_sync.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from gspo_moe.config.architecture import PRESETS, Architecture
from gspo_moe.model.names import hf_shapes

GB = 1e9
MODELS = {"30B": "qwen3_30b_a3b", "235B": "qwen3_235b_a22b"}


@dataclass(frozen=True)
class Machine:
    """servers: that take the weights. disk: GB/s of the shared file system, of all its users together, each way.
    network: GB/s of one GPU's link to other nodes. nvlink: GB/s of a GPU's links within its node.
    tensor: microseconds that each end spends on one HF tensor.
    """

    servers: int
    disk: float
    network: float
    nvlink: float
    tensor: float


def seconds(nbytes: float, tensors: int, machine: Machine) -> dict[str, tuple[float, float]]:
    """For each way: how long the sync takes, and for how long of it servers do not generate."""
    each_end = tensors * machine.tensor * 1e-6
    read = max(nbytes * machine.servers / GB / machine.disk, each_end)
    crossing = nbytes / GB / machine.network
    inside = nbytes / GB / machine.nvlink
    return {
        "folder": (nbytes / GB / machine.disk + read, read),
        "broadcast, NCCL between nodes": (crossing + each_end,) * 2,  # one bucket is collected as another is sent
        "broadcast, NCCL within a node": (inside + each_end,) * 2,
        "CUDA IPC": (inside + 2 * each_end,) * 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"servers": 4, "disk": 20.0, "network": 45.0, "nvlink": 360.0, "tensor": 100.0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    machine = Machine(**vars(parser.parse_args()))
    rows: dict[str, list[str]] = {}
    for preset in MODELS.values():
        shapes = hf_shapes(Architecture(**{"vocab_size": 151_936, **PRESETS[preset]}))
        nbytes = 2.0 * sum(_count(shape) for shape in shapes.values())
        rows.setdefault("bf16 weights, HF tensors", []).append(f"{nbytes / GB:.0f} GB, {len(shapes):,}")
        for way, (whole, paused) in seconds(nbytes, len(shapes), machine).items():
            rows.setdefault(way, []).append(f"{whole:.1f} s ({paused:.1f} s)")
    print("| sync (of it servers pause) | " + " | ".join(MODELS) + " |")
    print("|---|" + "--:|" * len(MODELS))
    for way, cells in rows.items():
        print(f"| {way} | " + " | ".join(cells) + " |")


def _count(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


if __name__ == "__main__":
    main()
