"""Seconds and peak memory of one call of `benchmark_kernels.py`, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Function = Callable[..., torch.Tensor]
PASSES = ("forward", "forward_backward")
HEAD_START = 2_000_000  # clock cycles that a GPU waits before a timed call, in which the host queues all of it
COPIED_BYTES = 2**31


class Trial:
    """Runs one implementation after another; what fails of others than this project's becomes a row with its error."""

    def __init__(self, op: str, functions: dict[str, Function]) -> None:
        self.able = dict(functions)
        self.errors: list[dict[str, Any]] = []
        self._op = op

    def each(self, call: Callable[[str, Function], object]) -> None:
        """Calls with every implementation that has not failed yet."""
        for name, function in list(self.able.items()):
            try:
                call(name, function)
            except Exception as error:
                if name == "gspo_moe":
                    raise
                why = f"{type(error).__name__}: {error}"[:300]
                self.errors.append({"op": self._op, "implementation": name, "error": why})
                del self.able[name]


def run(case: Any, function: Function, backward: bool) -> torch.Tensor:
    with torch.set_grad_enabled(backward):
        found: torch.Tensor = case.forward(function)
        if backward:
            case.backward(found)
    return found.detach()


def resident(field: str) -> int:
    """VmRSS or, since the last reset, VmHWM, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def extra_bytes(call: Callable[[], object], on_gpu: bool) -> int:
    """Peak memory during the call beyond that before it: resident, or allocated on the GPU."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or the call would find memory that the one before had freed
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 0)


def time_on_cpu(case: Any, function: Function, backward: bool) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of the pass."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run(case, function, backward)
    return {PASSES[backward]: (time.perf_counter() - start, time.process_time() - cpu_start)}


def time_on_gpu(case: Any, function: Function, backward: bool) -> dict[str, tuple[float, float]]:
    """(device, CPU) seconds of the pass; with backward also of the backward alone, the CPU's of both together."""
    cpu_start = time.process_time()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda._sleep(HEAD_START)
    with torch.set_grad_enabled(backward):
        events[0].record()
        found = case.forward(function)
        events[1].record()
        if backward:
            case.backward(found)
        events[2].record()
    torch.cuda.synchronize()
    cpu = time.process_time() - cpu_start
    if not backward:
        return {"forward": (events[0].elapsed_time(events[1]) / 1e3, cpu)}
    return {
        "backward": (events[1].elapsed_time(events[2]) / 1e3, cpu),
        "forward_backward": (events[0].elapsed_time(events[2]) / 1e3, cpu),
    }


def copy_row() -> dict[str, Any]:
    """The bandwidth of a plain copy on the GPU, bytes read and written."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    median = statistics.median(seconds[2:])
    row = {"op": "copy", "dtype": "uint8", "pass": "forward", "implementation": "torch.copy_", "seconds": median}
    return row | {"cpu_seconds": 0.0, "extra_bytes": 0, "gbytes_per_second": 2 * COPIED_BYTES / median / 1e9}
