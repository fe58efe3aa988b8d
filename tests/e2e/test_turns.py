"""A task of several turns, from outside the package, trained through the command and frozen in a bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gspo_moe.cli import main
from gspo_moe.rollout.bank import read_bank

LETTERS = list("abcdefghij")  # which end an answer, so that one of random weights is not endless
TASK = '''
from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.types import Prompt

LETTERS = "abcdefghij"


class Again:
    """Asks twice more; the third answer's length counts."""

    def size(self, split):
        return 3 if split == "train" else None

    def prompt(self, split, index):
        return Prompt(f"{split}/{index}", LETTERS[index : index + 3], "again")

    def reset(self, prompt):
        return "go"

    def step(self, prompt, turns):
        return "more" if sum(turn.role == "policy" for turn in turns) < 3 else None

    def reward(self, prompt, turns):
        return {"long": len(last_answer(turns)) / 60, "turns": len(turns) / 8}


def task(options, seed):
    game = Again()
    return Task("again", prompts=game, rubric=game, environment=game)
'''


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "again_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_experts": 8, "initializer_range": 0.1}
    return {
        "model": {"preset": "tiny", "overrides": sizes},
        "tokenizer": {"vocab_size": 272},
        "task": {"name": "again_task:task"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4, "max_response_tokens": 60, "stop": LETTERS},
        "algorithm": {"mini_batches": 2},
        "schedule": {"steps": 3},
        "evaluation": {"prompts": 2},
        "routing": {"replay": "r3"},
        "checkpoint": {"interval": 1, "export_hf": False},
        "logging": {"progress": False, "run_dir": str(tmp_path / "run")},
    }


def run(tmp_path: Path, config: dict[str, Any], *more: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([*more[:1], str(tmp_path / "config.yaml"), *more[1:]]) == 0


def test_conversations_are_trained_and_kept(tmp_path: Path, config: dict[str, Any]) -> None:
    run(tmp_path, config, "train")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "reward/mean" in line]
    assert len(steps) == 3
    for line in steps:
        # The trainer scores whole conversations as the engine sampled them turn by turn.
        assert line["mismatch/k3"] < 1e-9
        assert line["reward/mean"] == pytest.approx(line["reward/parts/long"] + line["reward/parts/turns"])
        assert line["routing/engine/slot_change"] < 0.01
        assert line["policy/entropy"] > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    # Three prompts are gone through over and over, with other random numbers in each epoch.
    assert [line["uid"] for line in samples] == [
        "train/0",
        "train/1",
        "train/2",
        "train/0/epoch2",
        "train/1/epoch2",
        "train/2/epoch2",
    ]
    assert any(line["response"].count("environment: more") == 2 for line in samples)
    for line in samples:
        assert line["turns"][0] == {"role": "environment", "text": "go"}
        assert line["reward"] == pytest.approx(sum(line["reward_parts"].values()))
    (start,) = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert (start["step"], start["world_size"], start["architecture"]["num_experts"]) == (0, 1, 8)

    bank = tmp_path / "bank.safetensors"
    run(tmp_path, {**config, "schedule": {"steps": 1}}, "bank", str(bank), f"logging.run_dir={tmp_path / 'freeze'}")
    rollouts = [one for group in read_bank(bank).groups for one in group.rollouts]
    for one in rollouts:
        assert one.turns[0].text == "go"
        assert sum(one.policy_mask) == len(one.log_probs) == sum(count for _, count in one.versions)
        assert one.routes is not None
        assert len(one.routes) == len(one.token_ids) - 1
    assert max(len(one.versions) for one in rollouts) == 3
    from_bank = {**config, "schedule": {"steps": 1}, "rollout": {**config["rollout"], "bank": str(bank)}}
    run(tmp_path, from_bank, "train", f"logging.run_dir={tmp_path / 'banked'}")
    banked = [json.loads(line) for line in (tmp_path / "banked" / "metrics.jsonl").read_text().splitlines()]
    # The bank's policy is the run's first, so that its first step is the run's own.
    (first,) = [line for line in banked if "reward/mean" in line]
    for name in ("reward/mean", "loss/policy", "ratio/token_max", "optimizer/grad_norm", "mismatch/k3"):
        assert first[name] == pytest.approx(steps[0][name], rel=1e-6, abs=1e-12), name
