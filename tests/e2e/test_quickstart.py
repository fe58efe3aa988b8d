"""The shipped quickstart, as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.program import ROOT, Program, metrics_by_step


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_accuracy_rises_by_twelve_points(seed: int, tmp_path: Path) -> None:
    outcome = Program(
        ["bash", ROOT / "launch" / "quickstart.sh"], tmp_path, RUN_DIR=str(tmp_path / "run"), SEED=str(seed)
    ).finish(seconds=1800)
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    steps = metrics_by_step(tmp_path / "run")
    assert max(steps) == 100
    assert steps[100]["eval/accuracy"] - steps[0]["eval/accuracy"] >= 0.12
