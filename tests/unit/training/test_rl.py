"""Whole RL steps in one process under Routing Replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.loading import load_config
from gspo_moe.config.training import ScheduleConfig
from gspo_moe.errors import TrainingError
from gspo_moe.training import learn
from gspo_moe.training.packs import pack_share
from gspo_moe.training.preflight import preflight
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer, open_session
from gspo_moe.training.sft import demonstration
from gspo_moe.training.step import train_minibatch
from gspo_moe.types import Prompt, Rollout, TrainingSample
from tests.policy import trainer_of

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
    with trainer_of(session) as trainer:
        yield trainer


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


def test_an_engine_of_other_numerics_takes_other_routes_and_says_so(tmp_path: Path) -> None:
    """And by default, of the same weights, the very same ones."""
    found = {}
    for numerics in ("trainer", "fp8_rounded"):
        settings = ("routing.engine_routes=true", f"rollout.numerics={numerics}")
        with opened(tmp_path / numerics, *settings, "algorithm.mini_batches=1") as trainer:
            rl_step(trainer)
            found[numerics] = rl_step(trainer).metrics
    for name in ("slot_change", "flip_rate"):
        assert found["trainer"][f"routing/engine/{name}"] == 0
        assert found["fp8_rounded"][f"routing/engine/{name}"] > 0.02
    assert found["trainer"]["mismatch/k3"] < 1e-9
    assert found["fp8_rounded"]["mismatch/k3"] > 1e-4
    assert found["fp8_rounded"]["routing/staleness/slot_change"] == 0  # of the trainer's own forwards


def test_r3_replays_a_rounded_engines_routes_where_r2_replays_the_trainers(tmp_path: Path) -> None:
    held: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    figures = {}
    for replay in ("none", "r2", "r3"):
        settings = (f"routing.replay={replay}", "rollout.numerics=fp8_rounded", "routing.engine_routes=true")
        opening = opened(tmp_path / replay, *settings, "algorithm.mini_batches=2")
        with opening as trainer, pytest.MonkeyPatch.context() as patch:
            seen = held[replay] = []

            def watched(*arguments: Any, seen: Any = seen, **named: Any) -> Any:
                seen += [(one.pack.routes_TAK, one.replay_TLK) for one in arguments[2].packs]
                return train_minibatch(*arguments, **named)

            patch.setattr(learn, "train_minibatch", watched)
            figures[replay] = rl_step(trainer).metrics
    for engine_TAK, replayed_TLK in held["r3"]:
        assert torch.equal(engine_TAK, replayed_TLK)
    differ = [(engine_TAK != replayed_TLK).any() for engine_TAK, replayed_TLK in held["r2"]]
    assert any(differ)
    assert all(replayed_TLK is None for _, replayed_TLK in held["none"])
    # Without the engine's routes a part of its mismatch is routing.
    assert figures["r3"]["mismatch/k3"] < figures["r2"]["mismatch/k3"] == figures["none"]["mismatch/k3"]


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
