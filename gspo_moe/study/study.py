"""One study from its file to its summary: cold start, banks, cells, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gspo_moe.config.lease import hold
from gspo_moe.config.outputs import output_fault
from gspo_moe.errors import ConfigError, StudyError
from gspo_moe.observability.reward_errors import FILE, first_reward_error
from gspo_moe.study.cells import Cell, Job, arms, bank_jobs, cells, cold_start_jobs
from gspo_moe.study.runner import Outcome, Running, last_words, run_jobs
from gspo_moe.study.spec import Study, load_study
from gspo_moe.study.summary import SHOWN, summarise, write_summary
from gspo_moe.study.table import Show, live_table

WIDTH = 200  # of what goes to a file


@dataclass(frozen=True)
class Plan:
    """Everything a study will run; `others` come before the cells that need them."""

    study: Study
    others: list[Job]
    cells: list[Cell]

    @property
    def jobs(self) -> list[Job]:
        return [*self.others, *(cell.job for cell in self.cells)]


def plan_study(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Raises ConfigError for what cannot run, before anything is started."""
    study, here = load_study(path, overrides), Path(path).parent
    return Plan(study, [*cold_start_jobs(study, here), *bank_jobs(study, here)], cells(study, here))


def run_study(path: str | Path, overrides: Sequence[str] = (), console: Console | None = None) -> Path:
    """Runs the cells that are not finished and writes `summary.json`, whose path is returned.

    Raises ConfigError before anything starts, StudyError at the end for cells that failed: the others are summarised.
    """
    plan = plan_study(path, overrides)
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    _take_folder(plan.study.folder)
    with live_table(plan.cells, plan.others, console) as show:
        show = _with_reward_errors(show, console)
        outcome = run_jobs(plan.jobs, plan.study.processes, plan.study.cells_at_once, show)
    summary = summarise(plan.study, plan.cells)
    written = write_summary(plan.study, summary)
    for shown in summary_tables(plan, summary):
        console.print(shown)
    _raise_failures(outcome)
    return written


def _with_reward_errors(show: Show, console: Console) -> Show:
    """Also tells of the first job with a reward that failed."""
    told = False

    def tell(running: Sequence[Running], outcome: Outcome) -> None:
        nonlocal told
        show(running, outcome)
        jobs = [*(one.job for one in running), *outcome.finished, *outcome.failed]
        errors = ((job, first_reward_error(job.folder)) for job in ([] if told else jobs))
        for job, error in errors:
            if error is not None:
                console.print(f"{job.folder / FILE}, {error}", soft_wrap=True, markup=False, highlight=False)
                told = True
                return

    return tell


def _take_folder(folder: Path) -> None:
    fault = output_fault(folder, folder=True)
    if fault is not None:
        raise ConfigError(f"study folder {fault}")
    hold(folder, "study folder")


def summary_tables(plan: Plan, summary: dict[str, Any]) -> list[Table]:
    """A table a mode and N: mean over seeds with the interval, and how many seeds that is."""
    tables: dict[tuple[str, int | None], Table] = {}
    for arm in arms(plan.study):
        key = (arm.mode, arm.mini_batches)
        if key not in tables:
            several = "" if arm.mini_batches is None else f", {arm.mini_batches} mini-batches"
            tables[key] = Table("", "seeds", *SHOWN.values(), title=f"{arm.mode}{several}", title_justify="left")
        found = summary["arms"][arm.name]
        figures = [_figure(found["metrics"].get(metric), metric) for metric in SHOWN]
        tables[key].add_row(arm.of, str(len(found["seeds"])), *figures)
    return list(tables.values())


def _figure(metric: dict[str, Any] | None, name: str) -> str:
    figure = (metric or {}).get("final" if name.startswith(("eval/", "reward/")) else "mean")
    if figure is None or figure["mean"] is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['mean']:.4g}"
    return f"{figure['mean']:.4g} [{figure['low']:.3g}, {figure['high']:.3g}]"


def _raise_failures(outcome: Outcome) -> None:
    if not outcome.failed:
        return
    first = outcome.failed[0]
    skipped = f"; skipped for that: {', '.join(job.title for job in outcome.skipped)}" if outcome.skipped else ""
    raise StudyError(
        f"failed: {', '.join(job.title for job in outcome.failed)}{skipped}. Start the study again to go on where "
        f"they stand. End of {first.folder}/log.txt:\n{last_words(first.folder)}"
    )
