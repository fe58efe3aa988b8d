"""tools/compare_results.py on figures by hand: what counts as worse, and which files it refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.compare_results import Figure, changes, figures

SCRIPT = Path(__file__).parents[3] / "tools" / "compare_results.py"


def spread(least: float, median: float, most: float) -> dict[str, float]:
    return {"min": least, "median": median, "max": most}


PEERS: dict[str, Any] = {
    "benchmark": "peers",
    "conditions": {"processor": "a processor", "versions": {"torch": "2.13.0"}, "cases": {"m": {"answers": 32}}},
    "cases": {
        "m": {
            "ours_1": {
                "wall_seconds": {"step": spread(8.0, 8.5, 9.0), "update": spread(0.02, 0.02, 0.02)},
                "memory_gib": {"together": spread(1.0, 1.0, 1.0)},
            }
        }
    },
    "ratios": {"m": [{"name": "whole step, tokens/s", "wall": 2.5}]},
}
THROUGHPUT: dict[str, Any] = {
    "benchmark": "throughput",
    "device": "CPU",
    "torch": "2.13.0",
    "tokens": 4608.0,
    "tokens_per_second": 500.0,
    "seconds": {"step": spread(9.0, 9.0, 9.0), "rollout": spread(5.0, 5.0, 5.0)},
    "tflop": {"rollout": {"experts": 0.125}},
    "mfu": None,
    "metrics": {"timing/step_seconds": 9.0},
}


def with_step(least: float, median: float, most: float) -> dict[str, Any]:
    found = copy.deepcopy(PEERS)
    found["cases"]["m"]["ours_1"]["wall_seconds"]["step"] = spread(least, median, most)
    return found


def worse(before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.1) -> list[str]:
    return [change.name for change in changes(before, after) if change.is_worse(tolerance)]


@pytest.mark.parametrize(
    ("after", "tolerance", "is_worse"),
    [
        ((9.5, 9.75, 10.0), 0.1, True),  # by 14.7 %, and the best of it behind the worst before
        ((9.5, 9.75, 10.0), 0.15, False),
        ((8.9, 9.75, 10.0), 0.1, False),  # the spreads overlap
        ((7.0, 7.1, 7.2), 0.1, False),
    ],
)
def test_worse_is_beyond_tolerance_and_spreads(
    after: tuple[float, float, float], tolerance: float, is_worse: bool
) -> None:
    named = ["cases.m.ours_1.wall_seconds.step"] if is_worse else []
    assert worse(PEERS, with_step(*after), tolerance) == named


def test_of_speeds_less_is_worse() -> None:
    slower = {**THROUGHPUT, "tokens_per_second": 400.0}
    assert worse(THROUGHPUT, slower) == ["tokens_per_second"]
    assert worse(slower, THROUGHPUT) == []


def test_a_part_is_worse_only_where_the_step_feels_it() -> None:
    doubled = copy.deepcopy(PEERS)
    seconds = doubled["cases"]["m"]["ours_1"]["wall_seconds"]
    seconds["update"] = spread(0.04, 0.04, 0.04)  # 0.02 s more of a step of 8.5 s
    assert worse(PEERS, doubled) == []
    seconds["update"] = spread(0.125, 0.125, 0.125)
    assert worse(PEERS, doubled) == ["cases.m.ours_1.wall_seconds.update"]


def test_conditions_ratios_and_metrics_are_no_figures() -> None:
    found = figures(THROUGHPUT)
    assert sorted(found) == ["seconds.rollout", "seconds.step", "tokens_per_second"]
    assert found["tokens_per_second"] == Figure(500.0, 500.0, 500.0, True)
    assert found["seconds.rollout"] == Figure(5.0, 5.0, 5.0, False, whole=9.0)
    assert not any(name.startswith(("ratios", "conditions")) for name in figures(PEERS))


def test_items_of_a_list_are_figures_of_their_own() -> None:
    growth: dict[str, Any] = {
        "benchmark": "growth",
        "conditions": {},
        "curves": {"layers": {"training_seconds": {"values": [1.0, 2.0]}}},
    }
    slower = copy.deepcopy(growth)
    slower["curves"]["layers"]["training_seconds"]["values"][1] = 3.0
    assert worse(growth, slower) == ["curves.layers.training_seconds.values.1"]


def compare(folder: Path, before: Any, after: Any) -> subprocess.CompletedProcess[str]:
    names = []
    for name, found in (("before.json", before), ("after.json", after)):
        (folder / name).write_text(json.dumps(found))
        names.append(folder / name)
    return subprocess.run([sys.executable, SCRIPT, *names], capture_output=True, text=True)


def test_the_exit_code_says_whether_something_is_worse(tmp_path: Path) -> None:
    assert compare(tmp_path, PEERS, PEERS).returncode == 0
    outcome = compare(tmp_path, PEERS, with_step(10.0, 10.2, 10.5))
    assert outcome.returncode == 1
    assert "cases.m.ours_1.wall_seconds.step: 8.5 -> 10.2 (+20.0%), spreads 8-9 -> 10-10.5" in outcome.stdout


def test_unlike_conditions_and_other_files_are_refused(tmp_path: Path) -> None:
    other = copy.deepcopy(PEERS)
    other["conditions"]["versions"]["torch"] = "2.12.0"
    outcome = compare(tmp_path, PEERS, other)
    assert outcome.returncode == 2
    assert "unlike conditions" in outcome.stderr
    assert "  versions.torch: 2.13.0 -> 2.12.0" in outcome.stderr
    assert "tokens: 4608.0 -> 9216.0" in compare(tmp_path, THROUGHPUT, {**THROUGHPUT, "tokens": 9216.0}).stderr
    assert "benchmark: peers -> throughput" in compare(tmp_path, PEERS, THROUGHPUT).stderr
    outcome = compare(tmp_path, PEERS, {"rows": []})
    assert outcome.returncode == 2
    assert "is no file of results" in outcome.stderr
