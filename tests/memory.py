"""How much memory a piece of code holds at once, from torch's own record of its allocations."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


def memory_profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def peak_bytes(profile: torch.profiler.profile, mapped: Collection[int] = ()) -> int:
    """Most bytes of CPU tensors that were alive at once; files of `mapped` sizes are mapped, which takes no memory."""
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    used = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            used += event.nbytes()
            peak = max(peak, used)
    return peak
