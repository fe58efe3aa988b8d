"""Finds the runs that a report is about: single runs, and studies of arms over seeds.

A study is a folder `<study>/<arm>/seed<k>/` of ordinary runs, perhaps with a summary.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.observability import Run, load_run
from gspo_moe.observability.jsonl import read_json_lines
from gspo_moe.plain_json import read_object

METRICS_FILE = "metrics.jsonl"
SEED_FOLDER = re.compile(r"seed(\d+)")
BANK_ARM = re.compile(r"(.+)\.bank_n(\d+)")


@dataclass(frozen=True)
class Cell:
    """One run of an arm. samples: the records of samples.jsonl, empty where there is none."""

    seed: int
    run: Run
    samples: tuple[dict[str, Any], ...]

    @property
    def last_step(self) -> int:
        return max((int(steps[-1]) for steps, _ in self.run.series.values()), default=0)

    @property
    def planned_steps(self) -> int | None:
        """`schedule.steps`; None where the config does not tell."""
        steps = _section(self.run.config, "schedule").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        """False only for a run that is known to have stopped early."""
        return self.planned_steps is None or self.last_step >= self.planned_steps


@dataclass(frozen=True)
class Arm:
    """What is drawn as one curve: runs that differ in their seed alone."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def mini_batches(self) -> int | None:
        """N of an arm that trained on a study's bank, None for any other."""
        match = BANK_ARM.fullmatch(self.name)
        return int(match[2]) if match else None

    @property
    def of(self) -> str:
        """The arm's name in the study's file, the same online and on the bank."""
        match = BANK_ARM.fullmatch(self.name)
        return match[1] if match else self.name

    @property
    def names(self) -> set[str]:
        """Metrics that at least one of the runs has."""
        return {name for cell in self.cells for name in cell.run.names}


@dataclass(frozen=True)
class Collection:
    """arms: in the order given, a study's in that of its summary.json, else by name. problems: in words.

    baseline: `of` of the arm that differences are taken to, the study's own where it names one that is here.
    """

    title: str
    arms: tuple[Arm, ...]
    baseline: str
    problems: tuple[str, ...]

    @property
    def online(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.mini_batches is None)

    @property
    def bank(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.mini_batches is not None)


def collect(paths: Sequence[str | Path]) -> Collection:
    """Reads every run under `paths`; a run that cannot be read is left out and told among the problems.

    Raises DataError when a path is neither run nor study, or when no run is left; ConfigError without a path.
    """
    if not paths:
        raise ConfigError("give at least one folder of a run or of a study")
    folders = [Path(path) for path in paths]
    problems: list[str] = []
    found: dict[str, list[Path]] = {}
    baselines = []
    for folder in folders:
        summary = _summary(folder / "summary.json", problems)
        baselines.append(summary.get("baseline"))
        for name, runs in _arms(folder, [str(name) for name in summary.get("arms", ())], problems).items():
            found.setdefault(_unused(name, folder, found), runs)
    arms = []
    for name, runs in found.items():
        cells = [cell for cell in (_read(folder, problems) for folder in runs) if cell is not None]
        if cells:
            arms.append(Arm(name, tuple(sorted(cells, key=lambda cell: cell.seed))))
    if not arms:
        raise DataError("; ".join(problems))
    baseline = next((arm.of for arm in arms if arm.of in baselines), arms[0].of)
    title = ", ".join(folder.resolve().name for folder in folders)
    return Collection(title, tuple(arms), baseline, tuple(problems))


def _arms(folder: Path, order: Sequence[str], problems: list[str]) -> dict[str, list[Path]]:
    """Run folders by arm, in `order` as far as it goes: of one run, of an arm's folder, or of a study's."""
    if (folder / METRICS_FILE).is_file():
        here = folder.resolve()
        return {f"{here.parent.name}/{here.name}" if SEED_FOLDER.fullmatch(here.name) else here.name: [folder]}
    if _seeds(folder):
        return {folder.resolve().name: _seeds(folder)}
    children = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    # A study keeps other folders of seeds beside its arms, its banks for one.
    seeds = {child.name: _seeds(child) for child in children}
    arms = {name: runs for name, runs in seeds.items() if any((run / METRICS_FILE).is_file() for run in runs)}
    if not arms:
        raise DataError(
            f"{folder} is neither a run (a folder with {METRICS_FILE}) nor a study (folders ARM/seed1, ARM/seed2, ...)"
        )
    problems += [f"{folder}: no runs of the arm {name} of summary.json" for name in order if name not in arms]
    return {name: arms[name] for name in dict.fromkeys([*order, *arms]) if name in arms}


def _seeds(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if SEED_FOLDER.fullmatch(child.name) and child.is_dir())


def _summary(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = read_object(path)
        if not isinstance(summary.get("arms", {}), dict | list):
            raise ValueError("its arms are neither named nor listed")
    except ValueError as error:
        problems.append(
            f"{path} is torn or damaged ({error}); arms stand in order of their names and the first one is the baseline"
        )
        return {}
    return summary


def _unused(name: str, folder: Path, found: dict[str, list[Path]]) -> str:
    """`name`, with more of its path where another arm already has it."""
    parents = list(reversed(folder.resolve().parts[1:-1]))
    while name in found and parents:
        name = f"{parents.pop(0)}/{name}"
    return name


def _read(folder: Path, problems: list[str]) -> Cell | None:
    try:
        run = load_run(folder)
    except (DataError, ConfigError) as error:
        problems.append(f"left out: {error}")
        return None
    problems += run.problems
    if not run.names:
        problems.append(f"{folder}: {METRICS_FILE} has no value yet")
    if not run.config:
        problems.append(f"{folder}: no config.yaml, so planned steps and config differences are not known")
    samples: list[dict[str, Any]] = []
    file = folder / "samples.jsonl"
    if file.is_file():
        try:
            samples, torn = read_json_lines(file)
            problems += torn
            whole = [sample for sample in samples if _is_sample(sample)]
            if len(whole) < len(samples):
                problems.append(f"{file}: {len(samples) - len(whole)} lines that are no samples are left out")
            samples = whole
        except DataError as error:
            problems.append(f"samples left out: {error}")
    match = SEED_FOLDER.fullmatch(folder.name)
    seed = int(match[1]) if match else run.config.get("seed", 0)
    return Cell(seed if isinstance(seed, int) else 0, run, tuple(samples))


def _is_sample(sample: dict[str, Any]) -> bool:
    """Whether it has the forms that pages read; a file of another hand may have any."""
    said = [sample.get(name) or [] for name in ("messages", "turns")]
    parts = sample.get("reward_parts") or {}
    numbers = [sample.get(name) for name in ("reward", "advantage")]
    numbers += parts.values() if isinstance(parts, dict) else [parts]
    return all(isinstance(one, list) and all(isinstance(each, dict) for each in one) for one in said) and all(
        one is None or (isinstance(one, int | float) and math.isfinite(one)) for one in numbers
    )


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
