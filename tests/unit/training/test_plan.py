"""Which runs a config may go on with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gspo_moe.config.loading import load_config, save_config
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.training.plan import check_continues


def started(folder: Path, *overrides: str) -> None:
    """A run that has written one checkpoint."""
    save_config(configured(folder, *overrides), folder / "config.yaml")
    (folder / "checkpoints" / "step_00000003").mkdir(parents=True)


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"logging.run_dir={folder}", *overrides])


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("seed=1", "seed=2", "seed was 1 and is 2"),
        ("stage=sft", "stage=rl", "stage was sft and is rl"),
        (
            "routing.frozen_router=true",
            "routing.frozen_router=false",
            "routing.frozen_router was true and is false, and its checkpoints hold no Adam state of the routers",
        ),
        (
            "algorithm.name=grpo",
            "algorithm.name=ppo",
            "algorithm.name was grpo and is ppo, and its checkpoints hold no value head",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(before: str, now: str, message: str, tmp_path: Path) -> None:
    started(tmp_path, before)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_continues(configured(tmp_path, now))
    assert f"logging.run_dir={tmp_path}" in str(caught.value)
    assert "another folder" in str(caught.value)
    if "checkpoints hold" in message:
        assert f"model={{checkpoint: {tmp_path}/checkpoints/step_00000003}}" in str(caught.value)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("routing.frozen_router=false", "routing.frozen_router=true"),
        ("routing.frozen_router=true", "routing.frozen_router=true"),
        ("algorithm.name=ppo", "algorithm.name=grpo"),
        ("algorithm.name=ppo", "algorithm.name=ppo"),
        ("algorithm.name=grpo", "algorithm.name=gspo"),
        ("optimizer.lr=1e-3", "optimizer.lr=1e-4"),
    ],
)
def test_what_trains_the_same_or_fewer_parameters_may_go_on(before: str, now: str, tmp_path: Path) -> None:
    started(tmp_path, before)
    check_continues(configured(tmp_path, now))


def test_without_a_checkpoint_nothing_is_gone_on_with(tmp_path: Path) -> None:
    save_config(configured(tmp_path, "seed=1"), tmp_path / "config.yaml")
    check_continues(configured(tmp_path, "seed=2"))
