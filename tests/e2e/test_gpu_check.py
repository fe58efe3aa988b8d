"""tools/gpu_check.sh as far as it goes without a GPU, its report from recorded figures, the quickstart on one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.program import ROOT, Program
from tools.gpu_report import goals, read_parts, render
from tools.kernel_timing import Trial
from tools.synthetic import Numbers, RandomPrompts
from tools.watching import time_calls

SCRIPT = ROOT / "tools" / "gpu_check.sh"
SUITE = """<testsuites><testsuite><testcase name="test_a_repeated_step_gives_equal_bits[local]"/>
<testcase name="test_other"><failure message="1 is not 2&#10;more">trace</failure></testcase>
<testcase name="test_two_gpus"><skipped message="one GPU"/></testcase></testsuite></testsuites>"""


def row(op: str, name: str, implementation: str, seconds: float, **more: float) -> dict[str, Any]:
    return {
        "op": op,
        "dtype": "bfloat16",
        "pass": name,
        "implementation": implementation,
        "seconds": seconds,
        "extra_bytes": 2**30,
        **more,
    }


def throughput(**more: Any) -> dict[str, Any]:
    spread = {"min": 1.0, "median": 1.0, "max": 1.0}
    return {
        "parameters": 3e9,
        "seconds": {"step": spread},
        "update_seconds": spread,
        "tflops_per_process": {"step": 90.0},
        "forward_backward_tflops": 210.0,
        "tokens_per_second": 6000.0,
        "rollout_tokens_per_second": 9000.0,
        "peak_memory_gib": {"device": spread},
        "profile": {"response_tokens": 16, "launches": 4000, "graph_launches": 15, "waits": 30},
        "metrics": {"routing/engine/slot_change": 0.0, "mismatch/k3": 3e-6},
        **more,
    }


def record(folder: Path, card: str | None) -> None:
    kernels = [
        row("copy", "forward", "torch.copy_", 1e-3, gbytes_per_second=3000.0),
        row("token_log_probs", "forward", "gspo_moe", 1e-3, gbytes_per_second=2700.0, copy_share=0.9),
        row("token_log_probs", "backward", "gspo_moe", 2e-3, gbytes_per_second=2400.0, copy_share=0.8),
        row("linear_token_log_probs", "forward_backward", "gspo_moe", 0.018),
        row("linear_token_log_probs", "forward_backward", "eager", 0.020, extra_bytes=9 * 2**30),
        {"op": "token_log_probs", "dtype": "bfloat16", "implementation": "liger_cross_entropy", "error": "no Triton"},
    ]
    baseline = {"seconds": {"step": 4.0}, "tokens_per_second": 2000.0, "rollout_tokens_per_second": 1000.0}
    files = {
        "env": {
            "card": card,
            "driver": "580",
            "torch": "2.11.0+cu130",
            "commit": "abc",
            "time": "now",
            "command": "it",
        },
        "kernels": kernels,
        "slice": throughput(),
        "mismatch": throughput(profile=None),
        "mismatch_fp32": throughput(profile=None),
        "baseline": {**baseline, "trl": "1", "transformers": "5", "peak_device_gib": 40.0},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "tests.xml").write_text(SUITE)
    (folder / "stages.txt").write_text("env 0 3\nslice 124 130\n")
    (folder / "quickstart.jsonl").write_text('{"step": 0, "eval/accuracy": 0.1}\n{"step": 4, "mismatch/k3": 0.0}\n')


def test_each_goal_is_answered_from_what_the_stages_left(tmp_path: Path) -> None:
    record(tmp_path, "NVIDIA H100 80GB HBM3")
    parts = read_parts(tmp_path)
    answers = [(goal.found, goal.reached) for goal in goals(parts)]
    assert answers == [
        (0.9, True),
        (0.8, False),
        (pytest.approx(0.9), True),
        (pytest.approx(1 / 9), True),
        (210.0, True),
        (9.0, True),
        (3.0, False),
        *[(0.0, True), (3e-6, False)] * 2,
        (1, False),
        (1, True),
        (4, True),
    ]
    text = "\n".join(render(parts, goals(parts)))
    for line in (
        "slice 130 s (exit 124)",
        "tests/gpu: 1 passed, 1 failed, 1 skipped",
        "  FAILED test_other: 1 is not 2",
        "quickstart: step 4, eval/accuracy 0.1, mismatch/k3 0",
        "4000 launches, 15 graphs, 30 waits",
        "failed: no Triton",
    ):
        assert line in text


def test_figures_that_a_cpu_gave_or_that_are_missing_answer_no_goal(tmp_path: Path) -> None:
    record(tmp_path, None)
    assert {goal.reached for goal in goals(read_parts(tmp_path))} == {None}
    record(tmp_path, "NVIDIA H100 80GB HBM3")
    for name in ("baseline.json", "tests.xml", "mismatch.json", "mismatch_fp32.json"):
        (tmp_path / name).unlink()
    parts = read_parts(tmp_path)
    assert [goal.reached for goal in goals(parts)] == [True, False, True, True, True, *[None] * 8, True]
    assert "whole step, tokens/s / TRL's" in "\n".join(render(parts, goals(parts)))


def test_what_a_stopped_stage_wrote_in_part_costs_no_other_figure(tmp_path: Path) -> None:
    record(tmp_path, "NVIDIA H100 80GB HBM3")
    for name in ("slice.json", "tests.xml", "quickstart.jsonl"):
        file = tmp_path / name
        file.write_text(file.read_text()[:-4])
    parts = read_parts(tmp_path)
    assert [parts[name] for name in ("slice", "tests", "quickstart")] == [None] * 3
    assert [goal.reached for goal in goals(parts)][:2] == [True, False]


def check(folder: Path, **environment: str) -> tuple[Program, Path]:
    """The script under way on this Python, without a developer's own wheels."""
    found = folder / "found"
    settings = {"DRY": "1", "OUT": str(found), "WHEELS": str(folder / "none"), "GSPO_MOE_PYTHON": sys.executable}
    return Program(["bash", SCRIPT], folder, **settings, **environment), found


def test_a_stage_that_is_none_is_refused(tmp_path: Path) -> None:
    program, found = check(tmp_path, STAGES="env slices")
    outcome = program.finish()
    assert outcome.code == 2
    assert "STAGES names slices; there are env build kernels slice tests" in outcome.stderr
    assert not found.exists()


def test_the_report_says_where_and_what_ran(tmp_path: Path) -> None:
    program, found = check(tmp_path, STAGES="env kernels")
    outcome = program.finish()
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    report = json.loads((found / "report.json").read_text())
    ran = [(stage["stage"], stage["exit"]) for stage in report["stages"]]
    assert ran == [("env", 0), ("kernels", 0)], outcome.stdout
    assert {row["op"] for row in report["kernels"]} == {"token_log_probs", "linear_token_log_probs"}
    assert report["env"]["python"].endswith(sys.executable)
    assert report["env"]["card"] is None
    assert "STAGES=env kernels" in report["env"]["command"]
    assert {goal["reached"] for goal in report["goals"]} == {None}
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert report["env"]["commit"].partition(", ")[0].removesuffix("-dirty") == head.stdout.strip()
    assert (found / "report.txt").read_text() in outcome.stdout


def test_an_argument_that_is_none_is_refused(tmp_path: Path) -> None:
    refused = subprocess.run(["bash", SCRIPT, "--prepared"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--prepared; the only one is --prepare" in refused.stderr


def test_a_folder_that_cannot_be_made_ends_the_check(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = subprocess.run(["bash", SCRIPT], env={**os.environ, "OUT": str(tmp_path / "file")}, capture_output=True)
    assert refused.returncode == 1
    assert not refused.stdout, "no stage ran"


@pytest.mark.slow
def test_every_stage_runs_in_tiny(tmp_path: Path) -> None:
    program, found = check(tmp_path, STAGES="env build kernels slice tests mismatch mismatch_fp32 quickstart")
    outcome = program.finish(seconds=3700)
    report = json.loads((found / "report.json").read_text())
    assert all(stage["exit"] == 0 for stage in report["stages"]), outcome.stdout + outcome.stderr
    assert len(report["stages"]) == 8
    assert report["slice"]["rollout_tokens"] == 4 * 2 * 6
    assert report["slice"]["tokens"] == 4 * 2 * (10 + 6)
    assert report["slice"]["seconds"]["training"]["max"] > report["slice"]["update_seconds"]["max"] > 0
    assert report["mismatch"]["metrics"]["routing/engine/slot_change"] == 0
    assert report["mismatch"]["metrics"]["mismatch/k3"] < 1e-6
    assert report["quickstart"]["step"] == 1
    assert report["tests"]["failed"] == 0


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_quickstart_fits_the_gpus(gpus: int, processes: int, tmp_path: Path) -> None:
    log, stub = tmp_path / "log", tmp_path / "python"
    # Answers how many GPUs there are, as this Python would if torch found so many, and notes what is to be started.
    counting = f"import torch; torch.cuda.device_count = lambda: {gpus}; exec(__import__('sys').argv[1])"
    stub.write_text(
        f'#!/usr/bin/env bash\n[ "$1" = -c ] && exec {sys.executable} -c "{counting}" "$2"\necho "$*" >>{log}\n'
        f'case "$*" in *quickstart_sft*) mkdir -p {tmp_path}/run/cold_start/hf ;; esac\n'
    )
    stub.chmod(0o755)
    run = tmp_path / "run"
    command: list[str | Path] = ["bash", ROOT / "launch" / "quickstart.sh", "schedule.steps=3"]
    outcome = Program(command, tmp_path, GSPO_MOE_PYTHON=str(stub), RUN_DIR=str(run)).finish()
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    started = [line for line in log.read_text().splitlines() if "gspo_moe train" in line]
    assert len(started) == 2
    for line in started:
        assert f"--nproc-per-node {processes} -m gspo_moe train examples/quickstart" in line
        assert f" parallel.expert={processes} " in line
    assert started[1].endswith("schedule.steps=3")


def test_random_prompts_are_of_their_size_and_always_the_same() -> None:
    tokenizer, prompts = Numbers(1000), RandomPrompts(17, 1000)
    texts = [prompts.prompt("train", index).text for index in range(50)]
    ids = [tokenizer.encode(text) for text in texts]
    assert all(len(one) == 17 and max(one) < 1000 for one in ids)
    assert len({tuple(one) for one in ids}) == 50
    assert [tokenizer.decode(one) for one in ids] == texts
    assert prompts.prompt("train", 3) == RandomPrompts(17, 1000).prompt("train", 3)


def test_timed_calls_do_what_they_did() -> None:
    waits: list[int] = []

    class Adder:
        def add(self, a: int, b: int) -> int:
            return a + b

    adder = Adder()
    seconds = time_calls(adder, "add", lambda: waits.append(1))
    assert [adder.add(1, b=2), adder.add(3, 4)] == [3, 7]
    assert len(seconds) == 2
    assert min(seconds) >= 0
    assert len(waits) == 4


def test_a_peer_that_fails_leaves_its_error_and_the_others_go_on() -> None:
    functions: dict[str, Any] = {"gspo_moe": lambda: 1, "peer": lambda: 1 // 0, "other": lambda: 2}
    trial, found = Trial("op", functions), list[Any]()
    for _ in range(2):
        trial.each(lambda name, function: found.append(function()))
    assert found == [1, 2, 1, 2]
    (error,) = trial.errors
    assert (error["op"], error["implementation"]) == ("op", "peer")
    assert "ZeroDivisionError" in error["error"]
    with pytest.raises(ZeroDivisionError):
        Trial("op", {"gspo_moe": functions["peer"]}).each(lambda name, function: function())
