"""A study's figures: each arm's means and intervals over seeds, paired differences to the baseline, collapses.

Invariant: a figure never hides how many seeds it rests on, nor which cells are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gspo_moe.files import write_whole
from gspo_moe.observability import Run, load_run
from gspo_moe.observability.comparison import LEVEL, CollapseRule, Estimate, estimate, find_collapse, paired_difference
from gspo_moe.study.cells import Arm, Cell
from gspo_moe.study.spec import Study

SUMMARY_FILE = "summary.json"
# Metric to the head of its column in the terminal.
SHOWN = {
    "eval/reward": "held-out reward, last",
    "eval/accuracy": "accuracy, last",
    "reward/mean": "reward, last",
    "clip_fraction/sequence": "clipped sequences",
    "clip_fraction/token": "clipped tokens",
    "ratio/token_std": "token ratio std",
    "ratio/sequence_std": "sequence ratio std",
    "routing/staleness/slot_change": "slots changed",
}
DEFINITIONS = {
    "mean": "over the run's measured points of each seed, then over seeds",
    "final": "over the last tenth of the run's measured points of each seed, then over seeds",
    "before_collapse": "as mean, up to the step that a run collapsed at where it did; not paired",
    "interval": f"{LEVEL:.0%} percentile bootstrap of the mean over seeds; null for fewer than two seeds",
    "paired": "arm minus baseline at the same seed, then over seeds",
    "collapse": str(CollapseRule()),
}


def summarise(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    """The summary of the cells that are finished, as plain values with null for what is not a number."""
    runs = {(cell.arm.name, cell.seed): load_run(cell.job.folder) for cell in cells if cell.job.done}
    by_name = {cell.arm.name: cell.arm for cell in cells}
    values = {name: _values(study, name, runs) for name in by_name}
    return {
        "study": study.name,
        "baseline": study.reference,
        "seeds": list(study.seeds),
        "definitions": DEFINITIONS,
        "arms": {name: _arm(study, arm, values[name], runs) for name, arm in by_name.items()},
        "paired": [
            {"arm": name, "baseline": base.name, "metric": metric, "of": kind, **_plain(difference)}
            for name, arm in by_name.items()
            if (base := _baseline(study, arm, by_name)) is not None and base.name != name
            for (metric, kind), own in values[name].items()
            if kind != "before_collapse"  # of other steps in each run
            if (difference := paired_difference(own, values[base.name].get((metric, kind), {}))).seeds
        ],
    }


def write_summary(study: Study, summary: dict[str, Any]) -> Path:
    """Puts the summary into the study's folder at once, so that a reader never sees half of it."""
    target = study.folder / SUMMARY_FILE
    write_whole(target, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return target


def _values(study: Study, arm: str, runs: dict[tuple[str, int], Run]) -> dict[tuple[str, str], dict[int, float]]:
    """By metric and kind, the finite value of each seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for seed in study.seeds:
        run = runs.get((arm, seed))
        collapsed = None if run is None else _collapse(run)
        for metric in run.names if run is not None else ():
            assert run is not None
            if "/layer_" in metric:
                continue
            kinds = {"mean": run.mean(metric), "final": run.final(metric)}
            kinds["before_collapse"] = run.mean(metric, before=collapsed)
            for kind, value in kinds.items():
                if math.isfinite(value):
                    found.setdefault((metric, kind), {})[seed] = value
    return found


def _arm(
    study: Study, arm: Arm, values: dict[tuple[str, str], dict[int, float]], runs: dict[tuple[str, int], Run]
) -> dict[str, Any]:
    present = [seed for seed in study.seeds if (arm.name, seed) in runs]
    metrics: dict[str, Any] = {}
    for (metric, kind), by_seed in values.items():
        figure = _plain(estimate(list(by_seed.values()))) | {"by_seed": {str(s): v for s, v in by_seed.items()}}
        metrics.setdefault(metric, {})[kind] = figure
    return {
        "mode": arm.mode,
        "of": arm.of,
        "mini_batches": arm.mini_batches,
        "settings": arm.settings,
        "seeds": present,
        "missing": [seed for seed in study.seeds if seed not in present],
        "steps": {str(seed): _length(runs[arm.name, seed]) for seed in present},
        "collapsed": {str(seed): _collapse(runs[arm.name, seed]) for seed in present},
        "metrics": metrics,
    }


def _length(run: Run) -> int:
    """Its last step with metrics, 0 without any."""
    return max((int(steps[-1]) for steps, _ in run.series.values()), default=0)


def _collapse(run: Run) -> int | None:
    """The step from which on the run's reward has collapsed, None where it has not."""
    if "reward/mean" not in run.names:
        return None
    index = find_collapse(run.values("reward/mean"))
    return None if index is None else int(run.steps("reward/mean")[index])


def _baseline(study: Study, arm: Arm, by_name: dict[str, Arm]) -> Arm | None:
    """The reference arm in the same mode with the same N."""
    same = (one for one in by_name.values() if one.of == study.reference)
    return next((one for one in same if (one.mode, one.mini_batches) == (arm.mode, arm.mini_batches)), None)


def _plain(figure: Estimate) -> dict[str, Any]:
    return {key: _finite(value) for key, value in asdict(figure).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
