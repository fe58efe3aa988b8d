"""Which runs a study consists of."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.study.cells import bank_jobs, cells
from gspo_moe.study.spec import load_study

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", ["routing_stability", "rollout_numerics", "rollout_mismatch"])
def test_each_cell_of_a_bank_learns_from_one_that_was_sampled_as_it_would(name: str, tmp_path: Path) -> None:
    study = load_study(EXAMPLES / f"study_{name}.yaml", [f"run_dir={tmp_path}"])
    made = {}
    for job in bank_jobs(study, EXAMPLES):
        settings = dict(one.split("=", 1) for one in job.arguments[3:])
        made[str(job.product)] = settings.get("rollout.numerics", "trainer"), int(settings["seed"])
    kinds = {settings.get("rollout.numerics") for settings in study.arms.values()}
    assert len(made) == len(kinds) * len(study.seeds)
    used = [cell for cell in cells(study, EXAMPLES) if cell.arm.mode == "bank"]
    assert {cell.config.rollout.bank for cell in used} == made.keys()
    for cell in used:
        assert made[str(cell.config.rollout.bank)] == (cell.config.rollout.numerics, cell.seed)
        assert Path(str(cell.config.rollout.bank)) in cell.job.needs
