"""The guard's counting, by itself."""

from __future__ import annotations

import math

import pytest

from gspo_moe.config.guard import GuardConfig
from gspo_moe.config.loading import load_config
from gspo_moe.errors import ConfigError
from gspo_moe.training.guard import Collapse, Guard


def guard(**settings: object) -> Guard:
    return Guard(GuardConfig.model_validate(settings))


def looks(one: Guard, metric: str, values: list[float]) -> list[Collapse | None]:
    return [one.look(step, {metric: value}) for step, value in enumerate(values, start=1)]


def test_without_bounds_nothing_is_watched() -> None:
    one = guard(patience=1)
    assert not one.watches
    assert one.look(1, {"reward/mean": math.nan}) is None


def test_only_steps_in_a_row_count_and_bounds_are_sound() -> None:
    one = guard(reward={"low": 0.25}, patience=3)
    found = looks(one, "reward/mean", [0.2, 0.1, 0.25, 0.2, 0.2, 0.2, 0.2])
    assert found[:5] == [None] * 5
    assert found[5] is not None
    assert (found[5].first, found[5].last) == (4, 6)
    assert found[5].words == (
        "reward/mean is 0.2, not at least guard.reward.low=0.25, and was out of its bounds in each step from 4 to 6"
    )
    assert found[6] is not None
    assert (one.first_bad, one.bad_steps(7)) == (4, 4)
    one.forget()
    assert (one.first_bad, one.bad_steps(7)) == (None, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 7.1])
def test_what_is_not_finite_is_out_of_bounds(value: float) -> None:
    found = guard(response_length={"high": 7.0}, patience=1).look(1, {"response/length_mean": value})
    assert found is not None
    assert "not at most guard.response_length.high=7" in found.words


def test_each_figure_counts_by_itself() -> None:
    """Two that take turns are no collapse; a step without a figure says nothing of it."""
    one = guard(entropy={"low": 0.5, "high": 2.0}, skipped_updates={"high": 0}, patience=2)
    assert one.look(1, {"policy/entropy": 0.1, "optimizer/skipped_updates": 0}) is None
    assert one.look(2, {"policy/entropy": 1.0, "optimizer/skipped_updates": 4}) is None
    assert one.first_bad == 2
    assert one.look(3, {"optimizer/skipped_updates": 0}) is None
    assert one.first_bad is None
    assert one.look(4, {"policy/entropy": 2.5}) is None
    found = one.look(5, {"policy/entropy": 2.5})
    assert found is not None
    assert (found.first, found.last) == (4, 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guard.reward={low: 1, high: 1}"], "guard.reward.low=1 is not below guard.reward.high=1"),
        (["guard.reward.low=.nan"], "guard.reward.low"),
        (["guard.reward.low=0", "guard.action=roll_back"], "has no checkpoint to go back to; set both to 1 or more"),
        (
            ["guard.reward.low=0", "guard.action=roll_back", "checkpoint.interval=5", "rollout.bank=b.safetensors"],
            "the bank has no prompts beside those of the run's steps",
        ),
    ],
)
def test_a_guard_that_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)
