"""tools/soak.py for a few seconds; what it finds in an hour is in docs/faults.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.program import ROOT

SMALL = (
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "model.overrides.num_hidden_layers=1",
    "evaluation.prompts=4",
    "checkpoint.export_hf=false",
)


def test_it_watches_a_run_and_ends_it_with_all_that_it_started(tmp_path: Path) -> None:
    looks = tmp_path / "looks.json"
    command: list[str | Path] = [
        sys.executable,
        ROOT / "tools" / "soak.py",
        "--steps",
        "12",
        "--minutes",
        "2",
        "--look",
        "0.05",
    ]
    done = subprocess.run([*command, "--json", looks, *SMALL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (0, 1), "1 where so few steps grow"
    assert done.stderr == ""
    found = json.loads(looks.read_text())
    assert found["steps"] == sorted(set(found["steps"]))
    assert found["steps"][-1] >= 12
    assert min(found["children"]) >= 2
    assert found["cpu_seconds"] == sorted(found["cpu_seconds"])
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == [
        "memory_mib", "children_memory_mib", "handles", "threads", "children", "step_cpu_seconds",
    ]  # fmt: skip
