"""Volatility of any MoE in anybody's trainer: needs torch alone, neither megatron-core nor this project's trainer.

A name's module is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_moe.watching.comparison import Comparison, compare
    from gspo_moe.watching.probe import Probe
    from gspo_moe.watching.snapshot import Snapshot, join
    from gspo_moe.watching.watcher import Capture, Watcher, watch

MODULES = ("comparison", "probe", "snapshot", "watcher")

__all__ = ["Capture", "Comparison", "Probe", "Snapshot", "Watcher", "compare", "join", "watch"]


def __getattr__(name: str) -> Any:
    for module in MODULES if name in __all__ else ():
        found = vars(importlib.import_module(f"gspo_moe.watching.{module}"))
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
