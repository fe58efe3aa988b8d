"""A run one step ahead of its server's answers, killed in the midst: the stand-in is the server."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import FinishedRun
from tests.e2e.program import ROOT, TASK, Program, gspo_moe, metrics_by_step, succeed
from tests.launch import free_port

COUNT = 5
STEPS = (
    *TASK,
    "rollout={engine: vllm, max_staleness: 1, prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 6}",
    "rollout.servers.start_seconds=100",
    "algorithm.mini_batches=2",
    "optimizer.lr=1e-2",
    "schedule={steps: 5, micro_batch_tokens: 64}",
    "evaluation.prompts=4",
    "routing.engine_routes=true",
    "parallel.expert=1",
    "checkpoint={interval: 1, export_hf: false}",
    "logging={samples_per_step: 4, run_dir: run}",
)


@pytest.fixture
def server(quickstart: FinishedRun, tmp_path: Path) -> Iterator[str]:
    port, script = free_port(), ROOT / "tests" / "support" / "stand_in.py"
    command: list[str | Path] = [
        sys.executable,
        script,
        quickstart.path / "cold_start" / "hf",
        "--port",
        str(port),
        "--routes",
    ]
    program = Program(command, tmp_path, PYTHONPATH=":".join([str(ROOT), *sys.path]))
    yield f"http://127.0.0.1:{port}"
    program.kill()


def test_a_run_goes_on_with_the_prompts_that_it_has_not_learnt(
    server: str, quickstart: FinishedRun, tmp_path: Path
) -> None:
    model = f"model.hf={quickstart.path / 'cold_start' / 'hf'}"
    config = ROOT / "examples" / "quickstart.yaml"
    command = gspo_moe("train", config, *STEPS, model, f"rollout.servers.urls=[{server}]")
    first, metrics = Program(command, tmp_path), tmp_path / "run" / "metrics.jsonl"
    first.wait_for(lambda: metrics.exists() and '"step": 2' in metrics.read_text())
    first.kill()
    outcome = succeed(command, tmp_path)
    assert "as these numerics allow (up to 1e-06)" in outcome.stderr
    steps = metrics_by_step(tmp_path / "run")
    for step in range(1, COUNT + 1):
        found = steps[step]
        assert found["lag/max"] <= 1
        assert found["lag/tokens/lag_0"] + found["lag/tokens/lag_1"] == pytest.approx(1)
        assert found.get("mismatch/k3/lag_0", 0.0) < 1e-8, "tokens of the step's own policy"
        assert found.get("routing/engine/slot_change/lag_0", 0.0) < 0.01
        assert found["queue/dropped"] == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    learnt = Counter(json.loads(line)["uid"] for line in lines)
    assert learnt == Counter(f"train/{index}" for index in range(4 * COUNT)), "each prompt once, in their order"
