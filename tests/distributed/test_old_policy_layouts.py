"""A step without the old policy's pass over its first mini-batch equals one with it in several processes too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch import launch
from tests.unit.training.test_old_policy import compare, run


def observe(folder: Path, *overrides: str) -> None:
    mine = folder / os.environ["RANK"]
    compare(run(mine, *overrides, always=False), run(mine, *overrides, always=True))


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "parallel.context=2",
            "algorithm.mini_batches=1",
            "algorithm.mismatch={correction: tis, level: token}",
            "algorithm.off_policy_mask=1e-3",
            "routing.replay=r3",
        ],
        ["parallel.pipeline=2", "algorithm.mini_batches=1", "routing.replay=r2"],
        ["parallel.tensor=2", "algorithm.mini_batches=2", "routing.record=false"],
        ["parallel.expert=2", "algorithm.mini_batches=2", "routing.record=false", "routing.replay=r3"],
    ],
)
def test_the_first_mini_batch_is_its_own_old_policy(overrides: list[str], tmp_path: Path) -> None:
    launch(observe, 2, tmp_path, "algorithm.name=grpo", *overrides)
