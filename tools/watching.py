"""What a benchmark learns of a running step: wall and CPU seconds, kernel launches, waits for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from gspo_moe.observability.timers import Timers
from gspo_moe.platform import device

if TYPE_CHECKING:
    from gspo_moe.training.session import Session

PROFILED_TOKENS = (
    16  # a token of each answer is some hundred operations, and a trace of thousands of them takes minutes
)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPH_LAUNCHES = ("cudaGraphLaunch",)
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


def profile_step(session: Session, step: Callable[[], object]) -> tuple[StepProfile, str]:
    """The figures of one step with short answers, and its operations as two tables: by the device's time, the CPU's.

    Leaves the session with the short answers.
    """
    rollout = session.config.rollout
    tokens = min(rollout.max_response_tokens, PROFILED_TOKENS)
    short = session.config.model_copy(update={"rollout": rollout.model_copy(update={"max_response_tokens": tokens})})
    session.plan = replace(session.plan, config=short)
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
