"""Figures of one value an arm: where training ended, paired differences, attribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gspo_moe.observability.comparison import paired_difference
from gspo_moe.report.collect import Arm
from gspo_moe.report.figures import Dot, DotPanel, Figure
from gspo_moe.report.series import dot, unit_of

ACCURACY, HELD_OUT = "eval/accuracy", "eval/reward"
NO_FULL_REWARD = (
    "Held-out accuracy is 0 throughout: no held-out answer got a reward of 1 or more, which a continuous reward may "
    "never give. The held-out reward tells how it went."
)
OUTCOMES = {
    ACCURACY: "Held-out accuracy",
    HELD_OUT: "Held-out reward",
    "reward/mean": "Training reward",
}
BANK_OUTCOMES = {
    ACCURACY: "Held-out accuracy",
    HELD_OUT: "Held-out reward",
    "ratio/sequence_std": "Sequence ratio std",
}
ATTRIBUTION = {
    "routing/attribution/phi_token": ("φ of tokens", None),
    "routing/attribution/phi_sequence": ("φ of sequences", None),
    "routing/attribution/washout": ("Washout W", 1.0),
}


def outcome_figure(arms: Sequence[Arm], baseline: str) -> Figure | None:
    """Where each arm's finished runs ended, and the differences to the arm `baseline`.

    None without a finished run, and for a single run, whose end the table of arms tells.
    """
    if sum(len(arm.cells) for arm in arms) < 2:
        return None
    panels: list[DotPanel] = []
    for metric, title in _told(OUTCOMES, arms).items():
        ends = {arm.name: finals(arm, metric) for arm in arms}
        dots = _rows(dot(name, list(values.values())) for name, values in ends.items())
        if dots:
            panels.append(DotPanel(f"{title} at the end", unit_of(metric), dots))
            panels += _differences(title, unit_of(metric), ends, baseline)
    if not panels:
        return None
    unfinished = [f"{arm.name}/seed{cell.seed}" for arm in arms for cell in arm.cells if not cell.finished]
    notes = (f"unfinished runs are left out, which may flatter their arm: {', '.join(unfinished)}",)
    return Figure(
        "outcomes",
        "Where training ended",
        "Mean over the last tenth of the measured points of each finished run. Differences are taken seed by seed.",
        tuple(panels),
        notes if unfinished else (),
    )


def no_full_reward(arms: Sequence[Arm]) -> bool:
    """Whether accuracy is 0 at every evaluation of every run while rewards are not."""
    runs = [cell.run for arm in arms for cell in arm.cells]
    accuracy, rewards = ([run.values(name) for run in runs if name in run.names] for name in (ACCURACY, HELD_OUT))
    return bool(accuracy) and not any(map(_any, accuracy)) and any(map(_any, rewards))


def _any(values: np.ndarray) -> bool:
    return bool(np.nan_to_num(values).any())


def _told(outcomes: Mapping[str, str], arms: Sequence[Arm]) -> dict[str, str]:
    """Without the accuracy that says nothing."""
    nothing = no_full_reward(arms)
    return {metric: title for metric, title in outcomes.items() if not (nothing and metric == ACCURACY)}


def finals(arm: Arm, metric: str) -> dict[int, float]:
    """The final value of each finished run by seed, finite ones only."""
    values = {cell.seed: cell.run.final(metric) for cell in arm.cells if cell.finished}
    return {seed: value for seed, value in values.items() if np.isfinite(value)}


def bank_figure(arms: Sequence[Arm], baseline: str) -> Figure | None:
    """What the bank's updates did, arm minus baseline at equal seed and N; None where there is nothing to compare."""
    panels = []
    for metric, title in _told(BANK_OUTCOMES, arms).items():
        for count in sorted({arm.mini_batches for arm in arms if arm.mini_batches is not None}):
            ends = {arm.of: finals(arm, metric) for arm in arms if arm.mini_batches == count}
            panels += _differences(f"{title}, N = {count}", unit_of(metric), ends, baseline)
    if not panels:
        return None
    return Figure(
        "bank_differences",
        "Bank: paired differences",
        "Arm minus baseline at the same seed and the same N, on the same rollouts.",
        tuple(panels),
    )


def _differences(title: str, unit: str, ends: dict[str, dict[int, float]], baseline: str) -> list[DotPanel]:
    dots = []
    for name in (arm for arm in ends if baseline in ends and arm != baseline):
        seeds = sorted(ends[name].keys() & ends[baseline].keys())
        if seeds:
            whole = paired_difference(ends[name], ends[baseline])
            each = tuple(ends[name][seed] - ends[baseline][seed] for seed in seeds)
            dots.append(Dot(name, name, whole.mean, whole.low, whole.high, each))
    return [DotPanel(f"{title}: paired difference to {baseline}", unit, tuple(dots), 0.0)] if dots else []


def attribution_figure(arms: Sequence[Arm], absent: list[str]) -> Figure | None:
    """φ and W of each arm, each seed's mean over its run."""
    panels, notes = [], []
    for metric, (title, reference) in ATTRIBUTION.items():
        dots = _rows(dot(arm.name, [cell.run.mean(metric) for cell in arm.cells]) for arm in arms)
        if dots:
            panels.append(DotPanel(title, "", dots, reference))
            lacking = [arm.name for arm in arms if arm.name not in {row.arm for row in dots}]
            notes += [f"{metric} not measured in: {', '.join(lacking)}"] if lacking else []
    if not panels:
        absent.append(f"Attribution φ and W (routing.attribution): {', '.join(ATTRIBUTION)}")
        return None
    return Figure(
        "attribution",
        "Routing attribution: φ and W",
        "φ: share of the log-ratio's variance that comes from routes that moved. W: about 1 where routing noise is "
        "independent between tokens, so that a mean over the sequence removes it; much above 1 where it survives. "
        "Each seed counts with its mean over the run.",
        tuple(panels),
        tuple(notes),
    )


def _rows(dots: Iterable[Dot | None]) -> tuple[Dot, ...]:
    return tuple(row for row in dots if row is not None)
