"""Do reward curves of ours and of TRL's overlap? Both learn one task from one cold start, with several seeds each."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.sides import ROOT, Side, python_script, run_side

# The cold start gets a part of it right, and GSPO more within some dozens of steps.
TASK = ("task.options.min_length=3", "task.options.max_length=5", "rollout.max_response_tokens=8", "parallel.expert=1")
COLD_START = (*TASK, "schedule.steps=120", "logging.progress=false", "checkpoint.keep=0")
GSPO = (
    *TASK,
    "rollout.prompts_per_step=16",
    "rollout.samples_per_prompt=8",
    "optimizer.warmup_updates=0",  # of which the two have different ideas
    "evaluation.prompts=0",
    "evaluation.interval=0",
    "checkpoint.interval=0",
    "checkpoint.keep=0",
    "checkpoint.export_hf=false",
    "logging.progress=false",
)
WINDOWS = 3
# Student's t, two-sided 95 %, by degrees of freedom: two sides of 2 to 6 seeds.
T_95 = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228}
MOST_SEEDS = 6


@dataclass(frozen=True)
class Agreement:
    """Mean reward over a window of steps: by seed on each side, their difference, and its 95 % interval's half."""

    window: str
    ours: list[float]
    trl: list[float]
    difference: float
    half_width: float

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= self.half_width


def cold_start(folder: Path) -> Path:
    """Trains the cold start; its HF folder."""
    command = (sys.executable, "-m", "gspo_moe", "train", str(ROOT / "examples" / "quickstart_sft.yaml"), *COLD_START)
    run_side(Side("cold start", (*command, f"logging.run_dir={folder}"), {"OMP_NUM_THREADS": "1"}, None))
    return folder / "hf"


def rewards_of_ours(hf: Path, seed: int, steps: int, folder: Path) -> list[float]:
    """The mean reward of each step."""
    command = (sys.executable, "-m", "gspo_moe", "train", *_gspo(hf, seed, steps), f"logging.run_dir={folder}")
    run_side(Side(f"ours, seed {seed}", command, {"OMP_NUM_THREADS": "1"}, None))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().strip().split("\n")]
    return [row["reward/mean"] for row in rows if "reward/mean" in row]


def rewards_of_trl(python: str, hf: Path, seed: int, steps: int) -> list[float]:
    side = python_script(f"TRL, seed {seed}", python, _gspo(hf, seed, steps), 1, "curves_trl.py")
    rewards: list[float] = run_side(side).figures["rewards"]
    return rewards


def _gspo(hf: Path, seed: int, steps: int) -> tuple[str, ...]:
    config = str(ROOT / "examples" / "quickstart.yaml")
    return (config, *GSPO, f"model.hf={hf}", f"seed={seed}", f"schedule.steps={steps}")


def agreements(ours: Sequence[Sequence[float]], trl: Sequence[Sequence[float]]) -> list[Agreement]:
    """Of the whole curve and of its last third; ours and trl: as many seeds each, the rewards of each step.

    The interval is Student's of two means with the two sides' own variances.
    """
    steps = len(ours[0])
    assert all(len(curve) == steps for curve in (*ours, *trl))
    last = steps - max(steps // WINDOWS, 1)
    windows = {"all steps": slice(0, steps), f"steps {last + 1} to {steps}": slice(last, steps)}
    return [_agreement(name, where, ours, trl) for name, where in windows.items()]


def _agreement(name: str, where: slice, ours: Sequence[Sequence[float]], trl: Sequence[Sequence[float]]) -> Agreement:
    mine, theirs = ([statistics.fmean(curve[where]) for curve in curves] for curves in (ours, trl))
    error = math.sqrt((statistics.variance(mine) + statistics.variance(theirs)) / len(mine))
    difference = statistics.fmean(mine) - statistics.fmean(theirs)
    return Agreement(name, mine, theirs, difference, T_95[2 * len(mine) - 2] * error)


def compare_curves(trl_python: str, seeds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains both sides by turns; what the file of results has. Raises TrainingError where one fails."""
    hf = cold_start(folder / "cold_start")
    ours, trl = [], []
    for seed in range(1, seeds + 1):
        ours.append(rewards_of_ours(hf, seed, steps, folder / f"ours_{seed}"))
        trl.append(rewards_of_trl(trl_python, hf, seed, steps))
        print(f"seed {seed}: ours {_ends(ours[-1])}, TRL {_ends(trl[-1])}", flush=True)
    found = agreements(ours, trl)
    for one in found:
        print(show(one))
    return {
        "benchmark": "curves",
        "seeds": seeds,
        "steps": steps,
        "ours": ours,
        "trl": trl,
        "agreements": [{**vars(one), "agrees": one.agrees} for one in found],
    }


def _ends(curve: Sequence[float]) -> str:
    few = max(len(curve) // 8, 1)
    return f"{statistics.fmean(curve[:few]):.3f} -> {statistics.fmean(curve[-few:]):.3f}"


def show(one: Agreement) -> str:
    def side(values: Sequence[float]) -> str:
        return f"{statistics.fmean(values):.4f} ({min(values):.4f}-{max(values):.4f})"

    answer = "agree within the noise of seeds" if one.agrees else "DIFFER by more than seeds do"
    return (
        f"mean reward over {one.window}: ours {side(one.ours)}, TRL {side(one.trl)}, difference {one.difference:+.4f} "
        f"+- {one.half_width:.4f} (95 %): {answer}"
    )
