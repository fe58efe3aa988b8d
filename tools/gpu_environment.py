"""What `gpu_check.sh` runs on: card, driver, versions, commit, command line; `gpu_environment.py FILE` writes JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
COMMIT_FILE = ROOT / ".gpu" / "commit"  # of a folder that came without .git, or was copied over another commit's
PACKAGES = ("triton", "megatron-core", "numpy", "transformers", "trl", "liger-kernel", "transformer-engine", "pytest")


def main() -> None:
    found = environment()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"  {name}: {value}")


def environment() -> dict[str, Any]:
    """None for what is not there; `command` is GPU_CHECK_COMMAND."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": os.environ.get("GPU_CHECK_COMMAND"),
        "commit": commit(),
        **_card(),
        "nvcc": _nvcc(),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.release()}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """The commit of this folder; where files differ or git is not there, also what `gpu_check.sh --prepare` noted."""
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--match=")
    if COMMIT_FILE.is_file() and (described is None or described.endswith("-dirty")):
        return ", prepared at ".join(filter(None, (described, COMMIT_FILE.read_text().strip())))
    return described


def _card() -> dict[str, Any]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        return {"card": None, "cards": 0, "driver": driver}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": None if driver is None else driver.splitlines()[0],
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _nvcc() -> str | None:
    release = re.search(r"release ([\d.]+)", _output("nvcc", "--version") or "")
    return release[1] if release else None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
