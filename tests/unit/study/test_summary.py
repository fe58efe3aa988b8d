"""The summary of runs that are written by hand here, against plain formulas."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml

from gspo_moe.config.loading import load_config, save_config
from gspo_moe.errors import ConfigError
from gspo_moe.study.cells import Cell
from gspo_moe.study.study import Plan, plan_study, summary_tables
from gspo_moe.study.summary import summarise, write_summary

STUDY = {
    "name": "s",
    "base": "base.yaml",
    "cold_start": {"base": "base.yaml", "set": {"stage": "sft"}},
    "seeds": [1, 2, 3],
    "arms": {"plain": {}, "other": {"algorithm.name": "grpo"}},
    "set": {"optimizer.lr": 0.01},
    "online": {"set": {"schedule.steps": 20}},
    "bank": {"mini_batches": [1, 4], "set": {"rollout.prompts_per_step": 16}},
}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("model: tiny\noptimizer: {lr: 1.0}\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return plan_study("study.yaml")


def finish(cell: Cell, rewards: list[float], **last: float | None) -> None:
    """Leaves what a finished run leaves."""
    cell.job.product.mkdir(parents=True)
    records: list[dict[str, float | None]] = [
        {"step": step, "reward/mean": reward, "time": 0.0} for step, reward in enumerate(rewards, start=1)
    ]
    records[-1] |= last
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (cell.job.folder / "metrics.jsonl").write_text(lines)


def test_a_study_is_a_cold_start_a_bank_a_seed_and_every_arm_with_every_seed(plan: Plan) -> None:
    assert [job.title for job in plan.others] == ["cold_start", "bank seed1", "bank seed2", "bank seed3"]
    names = ["plain", "other", "plain.bank_n1", "other.bank_n1", "plain.bank_n4", "other.bank_n4"]
    assert [(cell.seed, cell.arm.name) for cell in plan.cells] == [(seed, name) for seed in (1, 2, 3) for name in names]
    for cell in plan.cells:
        config = load_config(cell.job.arguments[1], cell.job.arguments[2:])
        assert config == cell.config
        assert config.run_path == Path("runs/s") / cell.arm.name / f"seed{cell.seed}"
        assert (config.seed, config.optimizer.lr, config.model.hf) == (cell.seed, 0.01, "runs/s/cold_start/hf")
        assert config.algorithm.name == ("grpo" if cell.arm.of == "other" else "gspo")
        assert config.schedule.steps == (20 if cell.arm.mini_batches is None else 1)
        if cell.arm.mini_batches is not None:
            assert (config.algorithm.mini_batches, config.rollout.prompts_per_step) == (cell.arm.mini_batches, 16)
            assert config.rollout.bank == f"runs/s/banks/seed{cell.seed}.safetensors"


def test_figures_over_seeds_and_in_pairs(plan: Plan) -> None:
    rewards = {("plain", 1): [0.0, 0.4], ("plain", 2): [0.2, 0.8], ("other", 1): [0.3, 0.5], ("other", 3): [0.9, 0.9]}
    for cell in plan.cells:
        if (cell.arm.name, cell.seed) in rewards:
            finish(cell, rewards[cell.arm.name, cell.seed], x=None)
    summary = json.loads(write_summary(plan.study, summarise(plan.study, plan.cells)).read_text())
    plain, other = summary["arms"]["plain"], summary["arms"]["other"]
    assert (plain["seeds"], plain["missing"], other["seeds"]) == ([1, 2], [3], [1, 3])
    assert plain["metrics"]["reward/mean"]["mean"]["mean"] == pytest.approx(statistics.mean([0.2, 0.5]))
    assert plain["metrics"]["reward/mean"]["final"]["by_seed"] == {"1": 0.4, "2": 0.8}
    assert plain["metrics"]["reward/mean"]["final"]["seeds"] == 2
    assert plain["metrics"]["reward/mean"]["final"]["low"] == pytest.approx(0.4)
    assert "x" not in plain["metrics"]
    (pair,) = (pair for pair in summary["paired"] if (pair["metric"], pair["of"]) == ("reward/mean", "final"))
    # Seed 1 alone has both arms, so that there is no interval.
    assert (pair["arm"], pair["baseline"], pair["seeds"], pair["low"]) == ("other", "plain", 1, None)
    assert pair["mean"] == pytest.approx(0.5 - 0.4)
    assert summary["arms"]["plain.bank_n4"]["missing"] == [1, 2, 3]
    assert len(summary_tables(plan, summary)) == 3


def test_a_collapse_is_told_with_its_step(plan: Plan) -> None:
    kept, lost, *_ = (cell for cell in plan.cells if cell.arm.name == "plain")
    finish(kept, [0.8] * 20)
    finish(lost, [0.8] * 6 + [0.1] * 20)
    summary = summarise(plan.study, plan.cells)
    # The mean of five steps is below 0.4 once three of them are 0.1: (2 * 0.8 + 3 * 0.1) / 5 = 0.38.
    plain = summary["arms"]["plain"]
    assert plain["collapsed"] == {"1": None, "2": 9}
    assert plain["steps"] == {"1": 20, "2": 26}
    before = plain["metrics"]["reward/mean"]["before_collapse"]["by_seed"]
    assert before == {"1": pytest.approx(0.8), "2": pytest.approx((6 * 0.8 + 2 * 0.1) / 8)}
    assert "50%" in summary["definitions"]["collapse"]


def test_a_cell_of_other_settings_is_refused(plan: Plan) -> None:
    cell = plan.cells[0]
    save_config(cell.config, cell.job.folder / "config.yaml")
    plan_study("study.yaml")
    with pytest.raises(ConfigError, match=r"runs/s/plain/seed1 holds a run of other settings \(optimizer.lr was 0.01"):
        plan_study("study.yaml", ["set.optimizer.lr=0.5"])


def test_a_cell_may_be_worked_at_otherwise_but_not_measured_otherwise(plan: Plan) -> None:
    cell = plan.cells[0]
    save_config(cell.config, cell.job.folder / "config.yaml")
    plan_study("study.yaml", ["set.task.reward.workers=2", "set.parallel.expert=2"])
    with pytest.raises(ConfigError, match=r"\(evaluation.samples was 1 and is 3\)"):
        plan_study("study.yaml", ["set.evaluation.samples=3"])


def test_another_cold_start_is_refused(plan: Plan) -> None:
    cold_start = plan.others[0]
    save_config(load_config(cold_start.arguments[1], cold_start.arguments[2:]), cold_start.folder / "config.yaml")
    plan_study("study.yaml")
    with pytest.raises(ConfigError, match=r"runs/s/cold_start holds a run of other settings \(schedule.steps was 100"):
        plan_study("study.yaml", ["cold_start.set.schedule.steps=7"])


def test_cells_keep_no_checkpoints_unless_told(plan: Plan) -> None:
    job = plan.cells[0].job
    assert "checkpoint.keep=0" in job.arguments
    assert (job.product, job.starts_anew) == (Path("runs/s/plain/seed1/finished"), True)
    assert "checkpoint.keep=0" not in plan.others[0].arguments
    told = plan_study("study.yaml", ["set.checkpoint.keep=1"]).cells[0].job
    kept = Path("runs/s/plain/seed1/checkpoints/step_00000020")
    assert (told.product, told.starts_anew) == (kept, False)
    Path("base.yaml").write_text("model: tiny\noptimizer: {lr: 1.0}\ncheckpoint: {keep: 3}\n")
    assert plan_study("study.yaml").cells[0].config.checkpoint.keep == 3


def test_a_cell_that_an_earlier_study_finished_with_a_checkpoint_is_done(plan: Plan) -> None:
    Path("runs/s/plain/seed1/checkpoints/step_00000020").mkdir(parents=True)
    assert plan_study("study.yaml").cells[0].job.done
    assert not plan_study("study.yaml").cells[1].job.done
