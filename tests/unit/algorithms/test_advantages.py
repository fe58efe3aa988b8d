"""Group advantages against golden vectors and NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.algorithms import degenerate_groups, group_advantages
from gspo_moe.errors import ConfigError, DataError

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "advantages.json").read_text())


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"group_size={case['group_size']}")
def test_golden_vectors(case: dict[str, Any]) -> None:
    rewards, size = torch.tensor(case["rewards"], dtype=torch.float64), case["group_size"]
    np.testing.assert_allclose(group_advantages(rewards, size), case["advantages"], rtol=0, atol=1e-10)
    constant = [np.ptp(group) == 0 for group in np.array(case["rewards"]).reshape(-1, size)]
    assert degenerate_groups(rewards, size) == sum(constant) > 0


def test_unscaled_advantages_are_rewards_less_their_groups_mean() -> None:
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.1, 0.1, 0.1]).double(), 3, scale=False)
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [0.1, 1e8 + 1 / 3, -7.7])
def test_equal_rewards_give_exactly_zero(reward: float) -> None:
    rewards = torch.full((7,), reward, dtype=torch.float64)
    assert group_advantages(rewards, 7).tolist() == [0.0] * 7
    assert degenerate_groups(rewards, 7) == 1


def test_float32_rewards_keep_shape_and_dtype() -> None:
    rewards = torch.tensor([0.25, 1.5, -3.0, 0.1, 0.2, 0.4])
    expected = []
    for group in rewards.double().numpy().reshape(2, 3):
        expected += ((group - group.mean()) / (group.std(ddof=1) + 1e-6)).tolist()
    advantages = group_advantages(rewards, 3)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == torch.tensor(expected).tolist()
    assert degenerate_groups(rewards, 3) == 0


def test_rewards_whose_squares_no_float_holds_are_refused_and_large_ones_are_not() -> None:
    with pytest.raises(DataError, match=r"reward 1 is 1e\+200, which is no number of at most 1e\+150 in size"):
        group_advantages(torch.tensor([0.0, 1e200, 1.0, 1.0], dtype=torch.float64), 4)
    found = group_advantages(torch.tensor([0.0, 1e140], dtype=torch.float64), 2)
    assert found.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


@pytest.mark.parametrize("function", [group_advantages, degenerate_groups])
@pytest.mark.parametrize(
    ("rewards", "group_size", "error", "message"),
    [
        ([0.0, 1.0, 0.0], 2, DataError, "multiple of group_size=2"),
        ([0.0, 1.0], 1, ConfigError, "raise samples_per_prompt"),
        ([0.0, float("nan"), 1.0, 1.0], 2, DataError, "reward 1 is nan"),
        ([0.0, 1.0, 1.0, float("-inf")], 2, DataError, "reward 3 is -inf"),
        ([[0.0, 1.0]], 2, DataError, r"\[1, 2\]"),
        ([0, 1], 2, DataError, "floats"),
    ],
)
def test_bad_input_is_refused(function: Any, rewards: Any, group_size: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        function(torch.tensor(rewards), group_size)
