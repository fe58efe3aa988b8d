"""Makes run folders and studies of known numbers, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gspo_moe.config import load_config, save_config
from gspo_moe.observability.jsonl import JsonLines
from gspo_moe.observability.samples import Sample, SampleWriter

LAYERS = 4
MARKUP = "</script><script>alert('run')</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}"

Metrics = Callable[[int], Mapping[str, float | None]]


def write_run(folder: Path, metrics: Metrics, *, steps: range, overrides: tuple[str, ...] = ()) -> Path:
    """A run whose line at each step is `metrics(step)`, with its config, and without samples."""
    save_config(load_config(None, [f"logging.run_dir={folder}", *overrides]), folder / "config.yaml")
    lines = JsonLines(folder / "metrics.jsonl", 0)
    for step in steps:
        lines.append({"step": step, "time": 1.0 * step, **metrics(step)})
    lines.close()
    return folder


def write_samples(folder: Path, steps: range) -> None:
    samples = SampleWriter(folder)
    for step in steps:
        for k in range(2):
            samples.write(
                Sample(
                    step=step, uid=f"train/{k}", prompt=f"sort {k}: {MARKUP}", response=f"answer at step {step}",
                    reward=float(k), advantage=k - 0.5, finished=k == 1,
                )
            )  # fmt: skip
    samples.close()


def training_metrics(rng: np.random.Generator, *, gain: float = 0.3, steps: int = 60, sequence: bool = True) -> Metrics:
    """Everything a routing study logs, by made-up laws with noise from `rng`."""
    moved = 0.006 * (1 + 0.2 * rng.standard_normal())

    def noisy(value: float, share: float = 0.05) -> float:
        return float(value * (1 + share * rng.standard_normal()))

    def metrics(step: int) -> dict[str, float | None]:
        reward = 0.2 + gain * step / steps
        values: dict[str, float | None] = {
            "reward/mean": noisy(reward, 0.08),
            "reward/parts/format": noisy(0.2 * reward),
            "reward/failures": 0.0,
            "reward/timeouts": 0.0,
            "groups/degenerate": float(step % 3),
            "policy/entropy": noisy(2.0 - gain),
            "response/truncated": 0.0,
            "clip_fraction/sequence": 0.0 if step < 4 else noisy(0.25 if sequence else 0.02),
            "clip_fraction/token": noisy(0.24 if sequence else 0.003),
            "ratio/token_std": noisy(0.05),
            "ratio/sequence_std": noisy(0.013),
            "response/length_mean": noisy(14.0, 0.02),
            "kl/old_k3": noisy(0.001),
            "optimizer/grad_norm": noisy(0.9),
            "routing/load/max_violation": noisy(0.8),
            "routing/load/cv": noisy(0.4),
            "routing/load/entropy": noisy(2.6, 0.01),
            "throughput/tokens_per_second": noisy(6200),
            "rollout/tokens_per_second": noisy(6700),
            "memory/peak_rss_gib": 1.1,
            "routing/staleness/slot_change": noisy(moved),
            "routing/staleness/noise_floor/slot_change": noisy(0.0004, 0.5),
            **{f"routing/staleness/slot_change/mini_batch_{k}": noisy(moved * (k - 1) / 1.5) for k in range(1, 5)},
            **{
                f"routing/staleness/slot_change/layer_{layer:02d}": noisy(moved * (0.6 + 0.3 * layer))
                for layer in range(LAYERS)
            },
        }
        if step % 10 == 0:
            values["eval/accuracy"] = noisy(reward, 0.04)
            values["eval/reward"] = 1.5 * reward
            values["routing/attribution/phi_token"] = noisy(0.3)
            values["routing/attribution/phi_sequence"] = noisy(0.1)
            values["routing/attribution/washout"] = noisy(1.1)
        return values

    return metrics


def write_study(folder: Path, arms: Mapping[str, tuple[str, ...]], *, seeds: range, steps: int = 60) -> Path:
    """`folder`/ARM/seedK runs with samples; `arms` gives each arm's config overrides."""
    for number, (arm, overrides) in enumerate(arms.items()):
        for seed in seeds:
            metrics = training_metrics(
                np.random.default_rng([number, seed]), gain=0.3 - 0.04 * number, steps=steps, sequence="gspo" in arm
            )
            run = write_run(
                folder / arm / f"seed{seed}",
                metrics,
                steps=range(1, steps + 1),
                overrides=(f"seed={seed}", f"schedule.steps={steps}", *overrides),
            )
            write_samples(run, range(1, steps + 1, 5))
    return folder
