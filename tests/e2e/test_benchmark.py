"""tools/benchmark_throughput.py: its figures against each other and against sizes and counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.program import ROOT, SMALL_MODEL, SMALL_RL, succeed
from tools.peak_tflops import known_peak_tflops

SCRIPT = ROOT / "tools" / "benchmark_throughput.py"
PHASES = ("rollout", "reward", "old_log_probs", "training", "rest")
SEQUENCES = 8 * 4
LAYERS, HIDDEN, EXPERTS = 2, 32, 8
PEAK_TFLOPS = 0.5


def test_figures_agree(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: tiny\n")
    launch: list[str | Path] = ["bash", ROOT / "launch" / "torchrun.sh", "--nproc-per-node", "2", "--"]
    config = ("config.yaml", *SMALL_MODEL, *SMALL_RL, "parallel.expert=2")
    options = ("--steps", "2", "--warmup", "0", "--peak-tflops", str(PEAK_TFLOPS), "--json", "found.json")
    outcome = succeed([*launch, SCRIPT, *config, *options], tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    seconds, tflop = found["seconds"], found["tflop"]
    assert set(seconds) == {"step", *PHASES}
    for spread in (*seconds.values(), found["peak_memory_gib"]["host"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert spread["median"] == pytest.approx((spread["min"] + spread["max"]) / 2)
    assert sum(seconds[phase]["median"] for phase in PHASES) == pytest.approx(seconds["step"]["median"])

    assert found["processes"] == 2
    slowest = seconds["step"]["max"]
    assert found["tokens_per_second"] * slowest == pytest.approx(found["tokens"])
    assert found["rollout_tokens_per_second"] * seconds["rollout"]["max"] == pytest.approx(found["rollout_tokens"])
    needed = sum(sum(parts.values()) for parts in tflop.values())
    assert found["mfu"] * PEAK_TFLOPS * slowest * 2 == pytest.approx(needed)
    assert f"MFU: {found['mfu']:.2%}" in outcome.stdout

    def router(tokens: float) -> float:
        return 2e-12 * LAYERS * HIDDEN * EXPERTS * tokens

    # A sequence's last token is never fed; a prompt is fed once for its four samples.
    prompts = (found["tokens"] - found["rollout_tokens"]) / 4
    assert tflop["old_log_probs"]["router"] == pytest.approx(router(found["tokens"] - SEQUENCES))
    assert tflop["training"]["router"] == pytest.approx(router(3 * (found["tokens"] - SEQUENCES)))
    assert tflop["rollout"]["router"] == pytest.approx(router(prompts + found["rollout_tokens"] - SEQUENCES))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".stdout", ".stderr")) == [
        "config.yaml",
        "found.json",
    ]


def test_only_rl_is_measured(tmp_path: Path) -> None:
    config = ROOT / "examples" / "quickstart_sft.yaml"
    found = subprocess.run([sys.executable, SCRIPT, config], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.strip().endswith("ConfigError: stage=sft: only RL steps are measured; set stage=rl")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", None),
        ("NVIDIA L4", None),
    ],
)
def test_peaks_are_of_the_chip_in_the_name(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak
