from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.observability.comparison import CollapseRule
from gspo_moe.report.collect import collect
from gspo_moe.report.tables import arm_rows, config_differences, run_rows
from tests.runs import Metrics, write_run

RULE = CollapseRule()


def _reward_that_ends_at(last: float) -> Metrics:
    return lambda step: {"reward/mean": 0.8 if step <= 20 else last, "eval/reward": 2 * last}


def test_arms_show_their_ends_over_finished_seeds_and_who_collapsed(tmp_path: Path) -> None:
    for seed, last in ((1, 0.9), (2, 0.0), (3, 0.7)):
        write_run(
            tmp_path / "arm" / f"seed{seed}",
            _reward_that_ends_at(last),
            steps=range(1, 41 if seed < 3 else 31),
            overrides=("schedule.steps=40",),
        )
    (row,) = arm_rows(collect([tmp_path / "arm"]).arms, RULE)
    assert (row.seeds, row.finished, row.judged) == (3, 2, 3)
    assert row.reward.mean == pytest.approx(0.45)
    assert row.reward.seeds == 2
    assert row.held_out.mean == pytest.approx(0.9)
    assert row.accuracy.seeds == 0
    # Three of the trailing five are zero at step 23: 0.32 of a best of 0.8.
    assert row.collapsed == {2: 23}
    runs = run_rows(collect([tmp_path / "arm"]).arms, RULE)
    assert [(run.seed, run.last_step, run.planned_steps, run.collapsed_at) for run in runs] == [
        (1, 40, 40, None),
        (2, 40, 40, 23),
        (3, 30, 40, None),
    ]


def test_config_differences_leave_out_seeds_and_folders(study: Path, tmp_path: Path) -> None:
    (row,) = config_differences(collect([study]).arms)
    assert (row.key, row.values) == ("algorithm.name", ("grpo", "gspo"))
    older = write_run(tmp_path / "older", lambda step: {"reward/mean": 0.0}, steps=range(2))
    config = (older / "config.yaml").read_text().replace("  mini_batches: 4\n", "")
    config += "own: {files: [{path: a.jsonl, split: null}], shuffle: true}\n"
    (older / "config.yaml").write_text(config)
    rows = {row.key: row.values for row in config_differences(collect([study / "gspo", older]).arms)}
    assert rows["algorithm.mini_batches"] == ("4", "(absent)")
    assert rows["own.files"][1] == '[{"path": "a.jsonl", "split": null}]'  # as YAML reads it
    assert rows["own.shuffle"][1] == "true"
