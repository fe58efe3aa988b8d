"""Which runs a study consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_moe.study.cells import Job, bank_jobs, cells, cold_start_jobs
from gspo_moe.study.spec import Study, load_study

EXAMPLES = Path(__file__).parents[3] / "examples"
STUDIES = ["routing_stability", "routing_stability_long", "rollout_numerics", "rollout_mismatch", "answer_length"]


def loaded(name: str, folder: Path, *overrides: str) -> Study:
    return load_study(EXAMPLES / f"study_{name}.yaml", [f"run_dir={folder}", *overrides])


def settings(job: Job) -> dict[str, str]:
    return dict(one.split("=", 1) for one in job.arguments if "=" in one)


@pytest.mark.parametrize("name", STUDIES)
def test_each_cell_of_a_bank_learns_from_one_that_was_sampled_as_it_would(name: str, tmp_path: Path) -> None:
    study = loaded(name, tmp_path)
    made = {str(job.product): settings(job) for job in bank_jobs(study, EXAMPLES)}
    kinds = {_rollouts(arm) for arm in study.arms.values()}
    assert len(made) == len(kinds) * len(study.seeds)
    used = [cell for cell in cells(study, EXAMPLES) if cell.arm.mode == "bank"]
    assert {cell.config.rollout.bank for cell in used} == made.keys()
    for cell in used:
        bank, own = made[str(cell.config.rollout.bank)], settings(cell.job)
        of_rollouts = {key for key in bank.keys() | own.keys() if key.startswith(("rollout.", "task."))}
        of_rollouts |= {"seed", "model.hf"}
        assert {key: bank.get(key) for key in of_rollouts - {"rollout.bank"}} == {
            key: own.get(key) for key in of_rollouts - {"rollout.bank"}
        }
        assert Path(str(cell.config.rollout.bank)) in cell.job.needs


def _rollouts(arm: dict[str, Any]) -> str:
    return str(sorted((key, value) for key, value in arm.items() if key.startswith(("rollout.", "task."))))


def test_a_cold_start_for_each_seed_is_another_run_and_its_cells_start_from_it(tmp_path: Path) -> None:
    one = loaded("answer_length", tmp_path, "cold_start.each_seed=false", "seeds=[3, 4]")
    assert [job.title for job in cold_start_jobs(one, EXAMPLES)] == ["cold_start"]
    each = loaded("answer_length", tmp_path, "cold_start.each_seed=true", "seeds=[3, 4]")
    starts = cold_start_jobs(each, EXAMPLES)
    assert [(job.title, settings(job)["seed"]) for job in starts] == [
        ("cold_start_seed3", "3"),
        ("cold_start_seed4", "4"),
    ]
    for job in (*bank_jobs(each, EXAMPLES), *(cell.job for cell in cells(each, EXAMPLES))):
        (start,) = (start for start in starts if settings(start)["seed"] == settings(job)["seed"])
        assert settings(job)["model.hf"] == str(start.product)
        assert start.product in job.needs
