"""Whole RL steps in one process under Routing Replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config.loading import load_config
from gspo_moe.config.training import ScheduleConfig
from gspo_moe.errors import TrainingError
from gspo_moe.parallel.groups import shut_down
from gspo_moe.training.packs import pack_share
from gspo_moe.training.preflight import preflight
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer, open_session, open_trainer
from gspo_moe.training.sft import demonstration
from gspo_moe.types import Prompt, Rollout, TrainingSample
from tests.launch import renew_port

SMALL = (
    "model=tiny",
    "model.overrides={num_hidden_layers: 2, hidden_size: 32, num_experts: 8, initializer_range: 0.2}",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=8",
    "algorithm.name=grpo",
    "optimizer.lr=1e-2",
    "logging.samples_per_step=0",
)


LARGER = ScheduleConfig(micro_batch_tokens=65)


@contextlib.contextmanager
def opened(folder: Path, *overrides: str) -> Iterator[Trainer]:
    session = open_session(preflight(load_config(None, [*SMALL, f"logging.run_dir={folder}", *overrides])))
    try:
        yield open_trainer(session)
        renew_port()
    finally:
        session.close()
        shut_down()


def test_the_engine_pair_has_a_floor_at_equal_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, "routing.engine_routes=true") as trainer:
        engine = trainer.session.answerer.engine
        assert rl_step(trainer).metrics["routing/engine/noise_floor/slot_change"] == 0

        def older(*arguments: Any) -> list[list[Rollout]]:
            answered = type(engine).generate(engine, *arguments)
            return [[replace(one, versions=((-1, len(one.log_probs)),)) for one in group] for group in answered]

        monkeypatch.setattr(engine, "generate", older)
        metrics = rl_step(trainer).metrics
    assert "routing/engine/slot_change" in metrics
    assert "routing/engine/noise_floor/slot_change" not in metrics


def test_samples_that_no_micro_batch_holds_end_a_run_that_can_be_saved(tmp_path: Path) -> None:
    with opened(tmp_path, "schedule.micro_batch_tokens=64") as trainer:
        session = trainer.session
        sample = TrainingSample(token_ids=(5,) * 66, response_mask=(0,) + (1,) * 65)
        assert len(pack_share([sample], session.groups, session.config.model_copy(update={"schedule": LARGER}))) == 1
        with pytest.raises(TrainingError, match=r"has 65 tokens, more than schedule.micro_batch_tokens=64"):
            pack_share([sample], session.groups, session.config)
        with pytest.raises(TrainingError, match="prompt sft/7 is empty"):
            demonstration(session.plan, Prompt("sft/7", "", "sort_letters"))


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_replayed_ratios_are_exactly_one_at_equal_weights(replay: str, tmp_path: Path) -> None:
    with opened(tmp_path, f"routing.replay={replay}", "algorithm.mini_batches=1") as trainer:
        for _ in range(2):
            # Even answers of random weights have unequal rewards seldom; the ratios do not ask for them.
            metrics = rl_step(trainer).metrics
            assert metrics["ratio/token_std"] == metrics["ratio/sequence_std"] == 0
            assert metrics["ratio/token_min"] == metrics["ratio/token_max"] == 1
            assert metrics["routing/staleness/slot_change"] == 0
