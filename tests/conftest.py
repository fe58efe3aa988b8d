"""What every test leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_THREADS = 300
TASKS = Path("/proc/self/task")


@pytest.fixture(autouse=True)
def _free_process_groups() -> Iterator[None]:
    """A model's cycles keep its gloo groups, each with threads that poll; hundreds of models would fill the machine."""
    yield
    if TASKS.is_dir() and sum(1 for _ in TASKS.iterdir()) > MOST_THREADS:
        gc.collect()
