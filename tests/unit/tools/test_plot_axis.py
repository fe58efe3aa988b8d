"""tools/plot_axis.py on a summary of known figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.errors import DataError
from tools.plot_axis import COLLAPSE_STEP, COLLAPSED, Point, by_mini_batches, chosen, curves, table

ROOT = Path(__file__).parents[3]


def arm(of: str, mean: float, *, collapsed: tuple[int | None, ...] = (), count: int | None = None) -> dict[str, Any]:
    figure = {"mean": mean, "low": mean - 0.25, "high": mean + 0.5, "seeds": 8}
    steps = {str(seed): step for seed, step in enumerate(collapsed)}
    metrics = {"ratio/token_std": {"mean": figure, "before_collapse": figure | {"mean": 2 * mean}}}
    lengths = dict.fromkeys(steps, 100)
    return {"of": of, "mini_batches": count, "collapsed": steps, "steps": lengths, "metrics": metrics}


SUMMARY = {
    "study": "made_up",
    "arms": {
        "grpo_256.bank_n8": arm("grpo_256", 3.0, count=8),
        "grpo_16.bank_n8": arm("grpo_16", 1.0, count=8),
        "gspo_r2_5e-4": arm("gspo_r2_5e-4", 2.0, collapsed=(None, 40, 60, None)),
        "plain": arm("plain", 9.0),
    },
}


def test_arms_are_points_at_the_number_behind_their_name() -> None:
    found = curves(SUMMARY, "ratio/token_std")
    assert {name: [(point.x, point.mean, point.interval) for point in points] for name, points in found.items()} == {
        "grpo, N = 8": [(16.0, 1.0, (0.75, 1.5)), (256.0, 3.0, (2.75, 3.5))],
        "gspo_r2": [(5e-4, 2.0, (1.75, 2.5))],
    }
    assert "| ratio/token_std | grpo, N = 8 |  | 1 [0.75, 1.5] | 3 [2.75, 3.5] |" in table({"ratio/token_std": found})


def test_curves_are_chosen_and_paired_by_seed() -> None:
    found = {
        "a": [Point(1.0, 2.0, None, 2, {"1": 1.0, "2": 3.0}), Point(2.0, 5.0, None, 1, {"1": 5.0})],
        "b": [Point(1.0, 0.5, None, 2, {"2": 1.0, "3": 0.0})],
    }
    picked = chosen(found, ["b", "a - b"])
    assert list(picked) == ["b", "a - b"]
    assert [(point.x, point.mean, point.interval, point.seeds) for point in picked["a - b"]] == [(1.0, 2.0, None, 1)]
    with pytest.raises(DataError, match="there is no curve c; there are a, b"):
        chosen(found, ["a - c"])


def test_banks_are_points_at_their_number_of_mini_batches() -> None:
    found = curves(SUMMARY, "ratio/token_std", place=by_mini_batches)
    assert {name: [point.x for point in points] for name, points in found.items()} == {
        "grpo_256": [8.0],
        "grpo_16": [8.0],
    }


def test_collapses_are_counted_over_seeds() -> None:
    assert curves(SUMMARY, COLLAPSED)["gspo_r2"][0].mean == 0.5


def test_a_run_that_did_not_collapse_counts_with_its_last_step() -> None:
    found = curves(SUMMARY, COLLAPSE_STEP)
    (point,) = found["gspo_r2"]
    assert point.mean == 75
    assert point.interval is not None
    assert 40 <= point.interval[0] < 75 < point.interval[1] <= 100
    assert table({COLLAPSE_STEP: found}).endswith("| gspo_r2 | none, 40, 60, none |")


def test_the_mean_may_be_of_the_steps_before_a_collapse() -> None:
    assert curves(SUMMARY, "ratio/token_std", "before_collapse")["gspo_r2"][0].mean == 4


def test_a_metric_that_no_arm_on_the_axis_has_is_named() -> None:
    with pytest.raises(DataError, match="made_up is on the axis and has kl/old_k3"):
        curves(SUMMARY, "kl/old_k3")


def test_the_command_draws_and_refuses_a_folder_without_a_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    command = [sys.executable, "tools/plot_axis.py", str(tmp_path), "--x", "tokens", "--metrics", "ratio/token_std"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "axis.png")
    assert (tmp_path / "axis.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "summary.json").unlink()
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "name a study's folder" in refused.stderr
