from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.report.collect import collect
from tests.runs import write_run, write_study


def _reward(step: int) -> dict[str, float]:
    return {"reward/mean": step / 10}


def test_a_study_is_arms_of_seeds_and_its_summary_gives_order_and_baseline(study: Path, tmp_path: Path) -> None:
    assert [arm.name for arm in collect([study]).arms] == ["grpo", "gspo"]
    assert collect([study]).baseline == "grpo"
    copy = shutil.copytree(study, tmp_path / "study")
    summary = {"baseline": "grpo", "arms": {"gspo": {}, "grpo": {}, "lost": {}}}
    (copy / "summary.json").write_text(json.dumps(summary))
    (copy / "cold_start").mkdir()
    (copy / "banks" / "seed1").mkdir(parents=True)
    found = collect([copy])
    assert found.title == "study"
    assert [(arm.name, [cell.seed for cell in arm.cells]) for arm in found.arms] == [
        ("gspo", [1, 2, 3]),
        ("grpo", [1, 2, 3]),
    ]
    assert found.baseline == "grpo"
    assert found.problems == (f"{copy}: no runs of the arm lost of summary.json",)
    (copy / "summary.json").write_text('{"arms": {"gs')
    assert [arm.name for arm in collect([copy]).arms] == ["grpo", "gspo"]
    assert "torn" in collect([copy]).problems[0]


def test_single_runs_are_arms_and_equal_names_get_their_parents(study: Path, tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "run", _reward, steps=range(3))
    other = write_run(tmp_path / "b" / "run", _reward, steps=range(3), overrides=("seed=7",))
    found = collect([one, other, study / "gspo" / "seed2", study / "gspo"])
    assert [arm.name for arm in found.arms] == ["run", "b/run", "gspo/seed2", "gspo"]
    assert [len(arm.cells) for arm in found.arms] == [1, 1, 1, 3]
    assert found.arms[1].cells[0].seed == 7


def test_arms_of_a_bank_carry_their_number_of_mini_batches(tmp_path: Path) -> None:
    write_study(tmp_path, {"gspo": (), "gspo.bank_n8": ()}, seeds=range(1, 2), steps=1)
    found = collect([tmp_path])
    assert [(arm.of, arm.mini_batches) for arm in found.online] == [("gspo", None)]
    assert [(arm.of, arm.mini_batches) for arm in found.bank] == [("gspo", 8)]


def test_a_run_is_finished_when_it_reached_its_planned_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "seed1", _reward, steps=range(1, 6), overrides=("schedule.steps=5",))
    write_run(tmp_path / "x" / "seed2", _reward, steps=range(1, 5), overrides=("schedule.steps=5",))
    (write_run(tmp_path / "x" / "seed3", _reward, steps=range(1, 3)) / "config.yaml").unlink()
    found = collect([tmp_path / "x"])
    assert [cell.finished for cell in found.arms[0].cells] == [True, False, True]
    assert len(found.problems) == 1
    assert "no config.yaml" in found.problems[0]


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / "x" / f"seed{seed}", _reward, steps=range(1, 4))
    (tmp_path / "x" / "seed1" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "rew')
    (tmp_path / "x" / "seed2" / "metrics.jsonl").write_text('not json\n{"step": 2}\n')
    (tmp_path / "x" / "seed3" / "samples.jsonl").write_text('broken\n{"step": 1}\n')
    found = collect([tmp_path / "x"])
    assert [cell.seed for cell in found.arms[0].cells] == [1, 3]
    assert [problem.split(": ")[0].split("/")[-1] for problem in found.problems[:1]] == ["metrics.jsonl, line 2"]
    assert "left out" in found.problems[1]
    assert "samples left out" in found.problems[2]


def test_a_folder_of_nothing_is_an_error_that_says_what_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a run .* nor a study"):
        collect([tmp_path])
    with pytest.raises(ConfigError, match="at least one folder"):
        collect([])
    (write_run(tmp_path / "r", _reward, steps=range(2)) / "metrics.jsonl").write_text("x\ny\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        collect([tmp_path / "r"])
