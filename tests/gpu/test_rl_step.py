"""One whole RL step in bf16 with the distributed optimizer, and a checkpoint of it."""

from pathlib import Path

import pytest

from tests.gpu.rl_step import step_save_and_load, step_twice
from tests.gpu.test_golden import needs
from tests.launch import launch


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_a_step_trains_and_its_checkpoint_brings_it_back(backend: str, tmp_path: Path) -> None:
    needs(backend)
    launch(step_save_and_load, 1, tmp_path, backend)


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_a_repeated_step_gives_equal_bits(backend: str, tmp_path: Path) -> None:
    needs(backend)
    launch(step_twice, 1, tmp_path, backend)


def test_two_gpus_take_a_step_with_the_experts_split_over_them(tmp_path: Path) -> None:
    needs("local", gpus=2)
    launch(step_save_and_load, 2, tmp_path, "auto", {"expert": 2})
