"""The lines at a run's start."""

from __future__ import annotations

import torch

from gspo_moe import __version__
from gspo_moe.config import load_config
from gspo_moe.config.layout import check_layout
from gspo_moe.observability.header import header_rows
from gspo_moe.platform import megatron_version

LARGE = ("model=qwen3_30b_a3b", "model.dtype=bf16", "parallel={tensor: 4, expert: 8, expert_tensor: 1}")


def test_it_says_what_runs_where_with_what() -> None:
    config = load_config(None, [*LARGE, "logging.run_dir=runs/a", "schedule.steps=20"])
    architecture = config.model.architecture()
    layout = check_layout(config, architecture, 32, "0.19.0")
    rows = dict(header_rows(config, layout, architecture, processes=32, kernels="cpu", step=7))
    assert rows["run"] == "runs/a, steps 8 to 20 of gspo, sort_letters"
    assert rows["model"] == "30.5 B parameters, 3.35 B active, bf16"
    assert rows["layout"] == "data 8, tensor 4, expert 8, expert_data 4"
    assert rows["device"].startswith("32 x ")
    assert rows["kernels"] == "cpu"
    assert rows["versions"] == f"gspo_moe {__version__}, torch {torch.__version__}, megatron-core {megatron_version()}"
    finished = dict(header_rows(config, layout, architecture, processes=32, kernels="cpu", step=20))
    assert finished["run"] == "runs/a, after step 20 of gspo, sort_letters"
