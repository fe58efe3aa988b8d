"""Settings and answers whose numbers are at an edge: refused, skipped with a word, or trained on like others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.cli import main
from gspo_moe.config.loading import load_config
from gspo_moe.errors import ConfigError
from gspo_moe.training import loop
from gspo_moe.training.rl import StepResult, rl_step
from gspo_moe.training.session import Trainer
from tests.replicas import flip
from tests.unit.training.test_rl import SMALL
from tests.unit.training.test_saving import QUIET


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\n")
    run = f"logging.run_dir={tmp_path / 'run'}"
    return ["train", str(config), *SMALL, *QUIET, "evaluation.prompts=0", "schedule.steps=2", run]


def steps(run: Path) -> list[dict[str, float | None]]:
    return [one for one in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "policy_version" in one]


@pytest.mark.parametrize(
    "setting",
    ["rollout.temperature=1e300", "algorithm.kl.coeff=1e30", "optimizer.lr=1e30", "optimizer.lr=3e38"],
)
def test_what_overflows_is_refused(setting: str) -> None:
    key, _, value = setting.partition("=")
    with pytest.raises(
        ConfigError, match=rf"{key}={float(value):g}: expected less than or equal to".replace("+", r"\+")
    ):
        load_config(None, [setting])


def test_answers_of_one_token_are_learnt_from(command: list[str], tmp_path: Path) -> None:
    """Their routes are compared nowhere: the token that the policy samples is never fed."""
    assert main([*command, "rollout.max_response_tokens=1"]) == 0
    for one in steps(tmp_path / "run"):
        assert one["response/length_mean"] == one["response/length_max"] == 1
        assert one["optimizer/skipped_updates"] == 0
        assert one["routing/load/max_violation"] is not None
        assert not [name for name in one if name.startswith("routing/staleness")]


def test_the_largest_that_are_taken_are_finite(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "rollout.temperature=1000", "algorithm.kl.coeff=1e6", "optimizer.lr=10"]) == 0
    for one in steps(tmp_path / "run"):
        assert one["optimizer/skipped_updates"] == 0
        assert one["optimizer/grad_norm"] is not None  # as what is not finite is written


def test_rollouts_of_other_weights_than_the_trainers_end_the_run_unsaved(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks_in_2(trainer: Trainer) -> StepResult:
        found = rl_step(trainer)
        if trainer.progress.step == 2:
            engine: Any = trainer.session.answerer.engine
            copied = engine._rounded.model.gpt_chunks[0]
            flip(copied.decoder.layers[1].mlp.experts.linear_fc2.weight, (3, 1, 2))
            assert copied.decoder.layers[1].mlp.experts.linear_fc2.weight.dtype == torch.bfloat16
        return found

    monkeypatch.setattr(loop, "rl_step", breaks_in_2)
    more = ("rollout.numerics=bf16", "parallel.check_interval=1", "checkpoint.interval=1", "schedule.steps=3")
    assert main([*command, *more]) == 7
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "gspo-moe: DivergenceError: after step 2 rollouts come from weights that are not the trainer's"
    )
    assert "as rollout.numerics asks: decoder.layers.1.mlp.experts.linear_fc2.weight; the memory" in told
    assert told.endswith(f"{tmp_path / 'run'}/checkpoints/step_00000001 holds its last checkpoint")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
