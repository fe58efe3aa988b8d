from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gspo_moe.report.collect import collect
from gspo_moe.report.facts import config_text, facts
from tests.runs import write_run

START = {
    "step": 0,
    "started": "2026-11-01T10:00:00+00:00",
    "device": "NVIDIA H100",
    "world_size": 8,
    "layout": {"data": 2, "tensor": 1, "pipeline": 1, "virtual_pipeline": None, "expert": 4},
    "architecture": {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048},
    "parameters": 30_532_122_624,
    "active_parameters": 3_353_032_704,
    "versions": {"gspo_moe": "0.1.0", "torch": "2.11.0"},
}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """One of today with two starts, and one of a version that kept none."""
    paths = tmp_path / "today", tmp_path / "older"
    for number, path in enumerate(paths):
        overrides = (f"algorithm.name={('gspo', 'grpo')[number]}", f"seed={number}", "parallel.expert=4")
        write_run(path, lambda step: {"reward/mean": 0.1}, steps=range(3), overrides=overrides)
    (paths[0] / "starts.jsonl").write_text("".join(json.dumps({**START, "step": step}) + "\n" for step in (0, 2)))
    return paths


def test_a_run_says_what_it_was(runs: tuple[Path, Path]) -> None:
    found = {fact.name: fact.values for fact in facts(collect(runs).arms)}
    assert found["model"] == (
        "tiny, fp32, 30.5 B parameters, 3.35 B active, 48 layers, 128 experts, 2048 hidden, top-8",
        "tiny, fp32",
    )
    assert found["task"] == ("sort_letters", "sort_letters")
    assert found["objective"] == ("gspo", "grpo")
    assert found["layout"] == ("8 processes, expert 4, data 2", "processes not recorded, expert 4")
    assert found["device"] == ("NVIDIA H100", "not recorded")
    assert found["versions"] == ("gspo_moe 0.1.0, torch 2.11.0", "not recorded")
    # Metrics of steps 0 to 2 were written in the first seconds of 1970, in whatever zone.
    assert all(value.split()[0] in ("1970-01-01", "1969-12-31") for value in found["run"])
    assert found["run"][0].endswith(", 2 starts")


def test_files_and_rewards_of_a_users_own_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda step: {"reward/mean": 0.1}, steps=range(2))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["task"] |= {
        "name": "data",
        "data": {"train": [{"path": "a.jsonl"}, {"path": "b.parquet"}], "eval": [{"path": "c.jsonl"}], "sft": []},
        "reward": {"sum": [{"name": "math", "weight": 1.0}, {"name": "format", "weight": 0.25}]},
        "environment": {"name": "python"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (task,) = (fact.values[0] for fact in facts(collect([run]).arms) if fact.name == "task")
    assert task == "data, train: a.jsonl + b.parquet, eval: c.jsonl, reward: 1 math + 0.25 format, environment: python"
    (run / "config.yaml").unlink()
    assert {fact.name: fact.values[0] for fact in facts(collect([run]).arms)}["model"] == "not recorded"


def test_the_config_shown_is_what_the_runs_share(runs: tuple[Path, Path]) -> None:
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    assert yaml.safe_load(config_text(collect(runs[:1]).arms)) == config
    shared = yaml.safe_load(config_text(collect(runs).arms))
    assert shared["optimizer"] == config["optimizer"]
    assert shared["seed"] == "(each run's own)"
    assert shared["algorithm"]["name"] == "(differs, see Config differences)"
