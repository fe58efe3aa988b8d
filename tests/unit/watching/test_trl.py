"""TRL's own trainer with the two lines of examples/watch_trl.py; GSPO_MOE_TRL_PYTHON names a Python that has trl."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("GSPO_MOE_TRL_PYTHON", sys.executable)


def records(*arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What the trainer printed of each step, TRL's metrics and ours in one record; and the example's own lines."""
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "examples/watch_trl.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{'loss'")]
    numbers = [{name: float(value) for name, value in record.items()} for record in printed]
    return numbers, [line for line in done.stdout.splitlines() if line.startswith('{"step"')]


@pytest.fixture(scope="module", autouse=True)
def trl() -> None:
    found = subprocess.run([PYTHON, "-c", "import trl"], capture_output=True)
    if found.returncode:
        pytest.skip(f"{PYTHON} has no trl; GSPO_MOE_TRL_PYTHON names another one")


def test_routing_stands_beside_trls_metrics_and_is_nothing_where_no_weight_moves() -> None:
    still, _ = records("--steps", "2", "--lr", "0")
    moving, lines = records("--steps", "2")
    assert len(still) == len(moving) == len(lines) == 2
    (documented,) = re.findall(r'(\{"step": 1, .*), \.\.\.\}', (ROOT / "docs/volatility.md").read_text())
    assert lines[0].startswith(documented)
    for record in (*still, *moving):
        assert {"reward", "entropy", "routing/update/any_layer_flip", "routing/update/router_margin"} <= set(record)
        assert record["routing/update/noise_floor/slot_change"] == 0
    assert all(record["routing/update/slot_change"] == 0 == record["routing/update/k3"] for record in still)
    assert all(record["routing/update/router_shift"] == 1 for record in still)
    assert all(record["routing/update/slot_change"] > 0 < record["routing/update/k3"] for record in moving)
