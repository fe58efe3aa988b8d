"""A run one step ahead of its server's answers, killed in the midst: the stand-in is the server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.e2e.program import Program, gspo_moe, metrics_by_step, succeed
from tests.e2e.test_servers import STEPS, Server, model, server

__all__ = ["model", "server"]  # fixtures
COUNT = 5


def test_a_run_goes_on_with_the_prompts_that_it_has_not_learnt(server: Server, tmp_path: Path) -> None:
    given = ("rollout.engine=vllm", f"rollout.servers.urls=[{server.url}]", "rollout.servers.start_seconds=100")
    ahead = (
        "rollout.max_staleness=1",
        f"schedule.steps={COUNT}",
        "checkpoint.interval=1",
        "logging.samples_per_step=4",
    )
    run = ("train", *STEPS, *given, *ahead, f"model={{hf: {server.model}}}", "logging.run_dir=run")
    first, metrics = Program(gspo_moe(*run), tmp_path), tmp_path / "run" / "metrics.jsonl"
    first.wait_for(lambda: metrics.exists() and '"step": 2' in metrics.read_text())
    first.kill()
    outcome = succeed(gspo_moe(*run), tmp_path)
    assert "first step: mismatch/k3" in outcome.stderr
    assert "as these numerics allow (up to 1e-06)" in outcome.stderr
    steps = metrics_by_step(tmp_path / "run")
    for step in range(1, COUNT + 1):
        found = steps[step]
        assert found["lag/max"] <= 1
        assert found["mismatch/k3"] == 0 or found["lag/tokens/lag_0"] + found["lag/tokens/lag_1"] == 1
        assert found.get("mismatch/k3/lag_0", 0.0) < 1e-8, "tokens of the step's own policy"
        assert found.get("routing/engine/slot_change/lag_0", 0.0) < 0.01
        assert found["queue/dropped"] == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    learnt = Counter(json.loads(line)["uid"] for line in lines)
    assert learnt == Counter(f"train/{index}" for index in range(4 * COUNT)), "each prompt once, in their order"
