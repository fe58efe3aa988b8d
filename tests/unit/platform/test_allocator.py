"""Freed memory stays with a process that asked for it: a process of its own counts its page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from gspo_moe.platform import device

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use(numbers):
    torch.empty(numbers).fill_(1)

device()
use(2**26)  # 256 MiB, more than malloc ever keeps by itself
before = faults()
use(2**25)
print(faults() - before)
"""


def faults_of_a_second_use(setting: str) -> int:
    environment = os.environ | {"GSPO_MOE_KEEP_MEMORY": setting, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_used_again_without_a_fault_unless_that_is_switched_off() -> None:
    assert faults_of_a_second_use("1") < 16
    assert faults_of_a_second_use("0") >= 2**27 // 2**21  # one for each huge page, where torch or glibc asks for those
