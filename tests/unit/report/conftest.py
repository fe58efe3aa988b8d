from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import write_study

ARMS = {"gspo": ("algorithm.name=gspo",), "grpo": ("algorithm.name=grpo",)}


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of three seeds, 60 steps; read only."""
    return write_study(tmp_path_factory.mktemp("runs") / "study", ARMS, seeds=range(1, 4))
