"""The example of one's own prompts and reward, from the project's folder as the README has it, cut to three steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.cli import main
from gspo_moe.observability import load_run
from tests.e2e.program import ROOT, json_lines


def test_the_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short = ("schedule.steps=3", "evaluation.samples=2", "checkpoint={keep: 0, export_hf: false}")
    assert main(["train", "examples/own_data/config.yaml", f"logging.run_dir={tmp_path}", *short]) == 0
    run = load_run(tmp_path)
    parts = run.values("reward/parts/digits") + run.values("reward/parts/close")
    assert run.values("reward/mean") == pytest.approx(parts, abs=1e-12)
    assert max(parts) > 0
    rows = json_lines(ROOT / "examples/own_data/prompts.jsonl")
    assert len(rows) == 20
    assert {sample["prompt"] for sample in json_lines(tmp_path / "samples.jsonl")} <= {row["question"] for row in rows}
