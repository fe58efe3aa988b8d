"""Reinforcement learning of Mixture-of-Experts language models on megatron-core; `watch` needs torch alone."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "watch":
        return importlib.import_module("gspo_moe.watching").watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
