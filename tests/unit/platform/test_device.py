import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspo_moe.platform import Device, device, peak_rss_gib


@pytest.fixture(autouse=True)
def decided_anew() -> Iterator[None]:
    device.cache_clear()
    yield
    device.cache_clear()


def test_without_a_gpu_it_is_the_cpu_with_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = device()
    assert here == Device("cpu", torch.device("cpu"), "gloo")
    assert here.peak_memory_gib() == 0.0
    here.synchronize()


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "any")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    here = device()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "without it deterministic products raise"
    assert here == Device("cuda", torch.device("cuda", 3), "nccl")
    assert chosen == [torch.device("cuda", 3)]
    assert here.peak_memory_gib() == 1.5


def test_it_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() is first


def test_peak_resident_memory_is_the_kernels_own_figure() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kibibytes = int(status["VmHWM"].split()[0])
    assert peak_rss_gib() == pytest.approx(kibibytes / 2**20, rel=0.01)
