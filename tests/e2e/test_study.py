"""A whole study from its file: cold start from a folder, bank, cells, summary; a second call runs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from gspo_moe.observability import load_run
from tests.e2e.conftest import FinishedRun
from tests.e2e.program import SMALL_RL, gspo_moe, succeed

ARMS = {"gspo": None, "grpo_r3": {"algorithm.name": "grpo", "routing.replay": "r3"}}
SHORT = {"evaluation.prompts": 8, "evaluation.interval": 0, "checkpoint.export_hf": False, "logging.progress": False}


def test_arms_start_from_the_same_rollouts_and_are_compared(quickstart: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(quickstart.path / "cold_start" / "hf")
    settings = dict(item.split("=") for item in SMALL_RL) | SHORT
    (tmp_path / "base.yaml").write_text("model: {hf: model}\n")
    study = {
        "name": "small",
        "base": "base.yaml",
        "seeds": [3],
        "arms": ARMS,
        "set": {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in settings.items()},
        "bank": {"mini_batches": [2], "set": {"optimizer.lr": 1e-2}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    command = gspo_moe("study", "study.yaml", "cells_at_once=1")
    outcome = succeed(command, tmp_path)
    folder = tmp_path / "runs" / "small"
    assert "done     grpo_r3.bank_n2 seed3  (3 of 3)" in outcome.stdout
    assert outcome.stdout.splitlines()[-1] == "runs/small/summary.json"
    runs = {name: load_run(folder / f"{name}.bank_n2" / "seed3") for name in ARMS}
    for name in ("reward/mean", "response/length_mean", "mismatch/k3", "groups/degenerate"):
        assert runs["gspo"].values(name)[0] == runs["grpo_r3"].values(name)[0]
    assert runs["gspo"].values("ratio/token_std")[0] != runs["grpo_r3"].values("ratio/token_std")[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["arms"]["grpo_r3.bank_n2"]["seeds"] == [3]
    differences = {(pair["metric"], pair["of"]): pair["mean"] for pair in summary["paired"]}
    assert differences["reward/mean", "mean"] == 0.0
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/seed3/metrics.jsonl")}
    succeed(command, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/seed3/metrics.jsonl")}
