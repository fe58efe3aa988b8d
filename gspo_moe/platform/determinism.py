"""Equal bits from equal steps on a GPU, where some of torch's kernels add in whatever order threads arrive."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from gspo_moe.platform.device import device


def prepare_determinism() -> None:
    """Sets what Transformer Engine reads when its attention is built; `device` has set what cuBLAS reads."""
    if device().kind == "cuda":
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """On a GPU: attention's backward, `index_add` and their like in a fixed order while inside.

    An operation that torch has no such kernel for raises RuntimeError, which names it; `model.deterministic: false`
    lets it run. The CPU adds in a fixed order anyway.
    """
    if not wanted or device().kind == "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor twice
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills
