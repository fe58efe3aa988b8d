"""launch/install.sh on a login node and then on a node with a GPU, with stand-ins for Python, pip and nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.program import ROOT

# Makes a venv of links to itself, and notes what pip is told.
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") echo "${@:3}" >>"$PIP_LOG"; case "$*" in *$PIP_FAILS*) exit 1 ;; esac ;;
esac
"""
CUDA = "--upgrade --force-reinstall --no-deps torch==2.13.0"


class Machine:
    """A project's folder of which every machine of a cluster sees the same."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self.bin = folder / "project", folder / "pip.log", folder / "bin"
        for name in ("launch", "gspo_moe/kernels/csrc"):
            (self.root / name).mkdir(parents=True)
        for name in ("launch/install.sh", "launch/requirements.txt", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "gspo_moe/kernels/build.py").touch()
        self.bin.mkdir()
        self.write("python3", PYTHON)

    def write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def install(self, *, gpu: bool, fails: str = "nothing", **environment: str) -> subprocess.CompletedProcess[str]:
        self.write("nvidia-smi", f"#!/bin/bash\nexit {0 if gpu else 9}\n")
        self.log.write_text("")
        given = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "GSPO_MOE_PYTHON", "GSPO_MOE_TORCH")}
        given |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "PIP_LOG": str(self.log), "PIP_FAILS": fails}
        command: list[str] = ["bash", str(self.root / "launch/install.sh")]
        return subprocess.run(command, env=given | environment, capture_output=True, text=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_venv_of_a_login_node_gets_the_cuda_build_on_a_node_with_a_gpu(machine: Machine) -> None:
    assert machine.install(gpu=False).returncode == 0
    assert "torch==2.13.0+cpu" in machine.log.read_text()
    assert machine.install(gpu=False).stderr == ""
    failed = machine.install(gpu=True, fails="force-reinstall")
    assert failed.returncode == 2
    assert "torch's CUDA build cannot be had here; where it can, run GSPO_MOE_TORCH=cuda" in failed.stderr
    again = machine.install(gpu=True)
    assert again.returncode == 0
    assert "has torch's CPU build, as no GPU was seen where it was made; taking the CUDA build" in again.stderr
    assert CUDA in machine.log.read_text()
    for gpu in (True, False):
        later = machine.install(gpu=gpu)
        assert (later.returncode, later.stderr, machine.log.read_text()) == (0, "", "")


def test_a_login_node_can_be_told_to_take_the_cuda_build(machine: Machine) -> None:
    assert machine.install(gpu=False, GSPO_MOE_TORCH="cuda").returncode == 0
    assert "+cpu" not in machine.log.read_text()
    assert machine.install(gpu=True).stderr == ""
    refused = machine.install(gpu=True, GSPO_MOE_TORCH="rocm")
    assert refused.returncode == 2
    assert "GSPO_MOE_TORCH=rocm: give cpu, cuda, or leave it out" in refused.stderr
