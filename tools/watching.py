"""What a benchmark learns of a running step: wall and CPU seconds, kernel launches, waits for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from gspo_moe.observability.timers import Timers
from gspo_moe.platform import device
from gspo_moe.rollout.source import EngineSource

if TYPE_CHECKING:
    from gspo_moe.training.session import Session

PROFILED_TOKENS = (
    16  # a token of each answer is some hundred operations, and a trace of thousands of them takes minutes
)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPH_LAUNCHES = ("cudaGraphLaunch",)
# Methods of a process group by the argument that a process sends; torch 2.13 renamed those of equal parts.
SENDS = dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "reduce", "send"), 0) | dict.fromkeys(
    (
        *("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single", "all_gather_single_coalesced"),
        *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
        *("alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter"),
    ),
    1,
)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class StepProfile:
    """One step with answers of at most `response_tokens`: kernels and graphs that the host launched, and its waits.

    Two waits a phase and two an update are the timers' own.
    """

    response_tokens: int
    launches: int
    graph_launches: int
    waits: int


class CpuTimers(Timers):
    """Timers that keep the CPU seconds of all threads of this process as well, by phase."""

    def __init__(self) -> None:
        super().__init__(device().synchronize)
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.process_time()
        with super().__call__(phase):
            yield
        self.cpu_seconds[phase] += time.process_time() - start


def time_calls(
    owner: Any, method: str, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Has every call of the method add its seconds to the list that is returned; waits for the device around it."""
    seconds: list[float] = []
    call = getattr(owner, method)

    @wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        start = clock()
        result = call(*args, **kwargs)
        synchronize()
        seconds.append(clock() - start)
        return result

    setattr(owner, method, timed)
    return seconds


@dataclass(frozen=True)
class Messages:
    """Of one process in a step: calls of collectives and sends in groups of several, and bytes handed to them."""

    messages: int
    sent_bytes: int


def count_messages(step: Callable[[], object]) -> Messages:
    """Takes the step and counts what this process sends through torch.distributed's process groups."""
    sizes: list[int] = []
    calls = {name: getattr(dist.ProcessGroup, name) for name in SENDS if hasattr(dist.ProcessGroup, name)}

    def counted(name: str) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                sizes.append(_bytes(args[SENDS[name]]))
            return calls[name](group, *args, **kwargs)

        return call

    try:
        for name in calls:
            setattr(dist.ProcessGroup, name, counted(name))
        step()
    finally:
        for name, call in calls.items():
            setattr(dist.ProcessGroup, name, call)
    return Messages(len(sizes), sum(sizes))


def _bytes(value: Any) -> int:
    """Of a tensor, or of the tensors in lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def profile_step(session: Session, step: Callable[[], object]) -> tuple[StepProfile, str]:
    """The figures of one step with short answers, and its operations as two tables: by the device's time, the CPU's.

    Leaves the session with the short answers.
    """
    rollout = session.config.rollout
    tokens = min(rollout.max_response_tokens, PROFILED_TOKENS)
    short = session.config.model_copy(update={"rollout": rollout.model_copy(update={"max_response_tokens": tokens})})
    session.plan = replace(session.plan, config=short)
    assert isinstance(session.source, EngineSource)
    session.source.config = short
    on_gpu = device().kind == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        step()
        device().synchronize()
    averages = found.key_averages()
    count = {key: sum(event.count for event in averages if event.key in names) for key, names in _COUNTED.items()}
    orders = ("self_device_time_total", "self_cpu_time_total") if on_gpu else ("self_cpu_time_total",)
    tables = [averages.table(sort_by=order, row_limit=40, max_name_column_width=80) for order in orders]
    return StepProfile(tokens, **count), "\n".join(tables)


_COUNTED = {"launches": LAUNCHES, "graph_launches": GRAPH_LAUNCHES, "waits": WAITS}
