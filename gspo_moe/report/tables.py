"""The tables of a report: arms, runs, config differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gspo_moe.observability.comparison import CollapseRule, Estimate, estimate, find_collapse
from gspo_moe.report.collect import Arm, Cell
from gspo_moe.report.facts import run_dates
from gspo_moe.report.outcomes import ACCURACY, HELD_OUT, finals

REWARD = "reward/mean"
# Where a run lies and what makes it a seed are no differences between arms.
NOT_COMPARED = ("seed", "logging.run_dir", "logging.wandb")
ABSENT = "(absent)"


@dataclass(frozen=True)
class ArmRow:
    """reward (of training), held_out (reward), accuracy: at the end of finished runs.

    collapsed: seeds and the step each collapsed at.
    """

    name: str
    of: str
    seeds: int
    finished: int
    reward: Estimate
    held_out: Estimate
    accuracy: Estimate
    collapsed: dict[int, int]
    judged: int


@dataclass(frozen=True)
class RunRow:
    arm: str
    path: str
    seed: int
    started: str
    last_step: int
    planned_steps: int | None
    collapsed_at: int | None


@dataclass(frozen=True)
class Difference:
    """One config key and its value in each arm; an arm whose seeds differ in it lists all of theirs."""

    key: str
    values: tuple[str, ...]


def arm_rows(arms: Sequence[Arm], rule: CollapseRule) -> tuple[ArmRow, ...]:
    rows = []
    for arm in arms:
        steps = {cell.seed: collapse_step(cell, rule) for cell in arm.cells}
        rows.append(
            ArmRow(
                arm.name,
                arm.of,
                len(arm.cells),
                sum(cell.finished for cell in arm.cells),
                estimate(list(finals(arm, REWARD).values())),
                estimate(list(finals(arm, HELD_OUT).values())),
                estimate(list(finals(arm, ACCURACY).values())),
                {seed: step for seed, step in steps.items() if step is not None},
                sum(REWARD in cell.run.names for cell in arm.cells),
            )
        )
    return tuple(rows)


def run_rows(arms: Sequence[Arm], rule: CollapseRule) -> tuple[RunRow, ...]:
    return tuple(
        RunRow(
            arm.name, str(cell.run.path), cell.seed, run_dates([cell]), cell.last_step, cell.planned_steps,
            collapse_step(cell, rule),
        )
        for arm in arms
        for cell in arm.cells
    )  # fmt: skip


def collapse_step(cell: Cell, rule: CollapseRule) -> int | None:
    """The step from which on the run has collapsed, None where it has not or has no reward."""
    if REWARD not in cell.run.names:
        return None
    index = find_collapse(cell.run.values(REWARD), rule)
    return None if index is None else int(cell.run.steps(REWARD)[index])


def config_differences(arms: Sequence[Arm]) -> tuple[Difference, ...]:
    """The keys whose value is not the same in every arm that has a config.yaml; other arms show as absent."""
    flat = [[_flat(cell.run.config) for cell in arm.cells] for arm in arms]
    keys = sorted({key for arm in flat for config in arm for key in config} - set(NOT_COMPARED))
    rows = []
    for key in keys:
        values = tuple(" or ".join(dict.fromkeys(config.get(key, ABSENT) for config in configs)) for configs in flat)
        if len({value for value, configs in zip(values, flat, strict=True) if any(configs)}) > 1:
            rows.append(Difference(key, values))
    return tuple(rows)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    values: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return values
