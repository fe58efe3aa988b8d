from __future__ import annotations

import platform
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from gspo_moe.config.architecture import PRESETS, Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.observability import load_run
from gspo_moe.observability.starts import write_start

LAYOUT = Layout(
    data=2, expert_data=1, tensor=1, pipeline=1, virtual_pipeline=None, expert=2, expert_tensor=1, context=1,
    sequence_parallel=False,
)  # fmt: skip


def test_every_start_is_kept_with_what_it_ran_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 20.5}\n{"step": 2, "time": 30.5}\n')
    architecture = Architecture(**PRESETS["qwen3_30b_a3b"])
    for step in (0, 4, 2):  # an attempt that went on from 4 counts no more where one goes on from 2
        write_start(tmp_path, step, LAYOUT, architecture, 2)
    run = load_run(tmp_path)
    assert [start["step"] for start in run.starts] == [0, 2]
    assert run.times == (20.5, 30.5)
    start = run.starts[-1]
    assert (start["world_size"], start["layout"]["expert"]) == (2, 2)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    assert versions.items() <= start["versions"].items()
    assert {"gspo_moe", "megatron-core"} <= start["versions"].keys()
    # The model's card gives 30.5 billion, of which 3.3 are active.
    assert round(start["parameters"] / 1e9, 1) == 30.5
    assert 3.3e9 < start["active_parameters"] < 3.4e9
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(start["started"])).total_seconds()) < 600
