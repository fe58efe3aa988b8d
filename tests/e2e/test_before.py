"""Runs, checkpoints and banks written by commit 2f602fb, as `tests/runs_before/make.sh` did, go on with its numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspo_moe.cli import main
from gspo_moe.config.loading import load_config
from gspo_moe.observability import load_run
from gspo_moe.parallel.groups import shut_down
from gspo_moe.report.collect import collect
from gspo_moe.report.page import page_parts
from tests.e2e.program import metrics_by_step

BEFORE = Path(__file__).parents[1] / "runs_before"
# Rounding of another build of torch; the smallest expected figures, of roundings alone, are about 1e-8.
RELATIVE, ABSOLUTE = 1e-4, 1e-6


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy as the working folder."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shut_down()


def assert_step(run: Path, expected: Path, step: int, gone: str = "") -> None:
    before, after = (metrics_by_step(folder)[step] for folder in (expected, run))
    before.pop(gone, None)
    assert {name: after.get(name) for name in before} == pytest.approx(before, rel=RELATIVE, abs=ABSOLUTE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="made on the CPU, whose generator draws other answers")
def test_a_run_goes_on(here: Path) -> None:
    assert main(["train", "run/config.yaml", "schedule.steps=3"]) == 0
    assert_step(here / "run", here / "expected" / "continued", 3)
    assert (here / "run" / "checkpoints" / "step_00000003").is_dir()
    steps, values = load_run(here / "run").layers["routing/staleness/slot_change"]
    assert (steps.tolist(), values.shape) == ([1, 2, 3], (3, 2))
    assert main(["report", "run", "--output", "page.html"]) == 0
    figures = page_parts(collect([here / "run"]))[1]["figures"]
    assert {"reward", "volatility_layers_staleness"} <= {figure["key"] for figure in figures}


@pytest.mark.skipif(torch.cuda.is_available(), reason="made on the CPU")
def test_a_bank_feeds_a_run(here: Path) -> None:
    given = ("schedule.steps=1", "logging.run_dir=from_bank", "rollout.bank=bank.safetensors")
    assert main(["train", "rl.yaml", *given]) == 0
    # A bank may be of any weights, so that nothing is said any more of what equal ones would give.
    assert_step(here / "from_bank", here / "expected" / "from_bank", 1, gone="routing/engine/noise_floor/slot_change")


def test_a_config_of_ppo_loads() -> None:
    config = load_config(BEFORE / "expected" / "ppo" / "config.yaml")
    assert config.has_value_head
