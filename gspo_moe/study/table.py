"""The live table of a study's cells: a row an arm, a column a seed. Without a terminal: a line whenever a job ends.

A cell shows its step, the reward of training and, once there is one, the held-out reward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gspo_moe.errors import GspoMoeError
from gspo_moe.observability import load_run
from gspo_moe.study.cells import Cell, Job
from gspo_moe.study.runner import Outcome, Running

Show = Callable[[Sequence[Running], Outcome], None]


@contextlib.contextmanager
def live_table(cells: Sequence[Cell], others: Sequence[Job], console: Console) -> Iterator[Show]:
    """Gives what `run_jobs` calls; `others` are cold start and banks, which have a row of their own."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda running, outcome: live.update(table(cells, others, running, outcome))
        return
    told: set[str] = set()

    def tell(_: Sequence[Running], outcome: Outcome) -> None:
        for word, jobs in _by_state(outcome).items():
            for job in jobs:
                if job.title not in told:
                    told.add(job.title)
                    console.print(f"{word:8s} {job.title}  ({len(told)} of {len(cells) + len(others)})", soft_wrap=True)

    yield tell


def table(cells: Sequence[Cell], others: Sequence[Job], running: Sequence[Running], outcome: Outcome) -> Table:
    """The state of every job as it is now."""
    seeds = sorted({cell.seed for cell in cells})
    shown = Table("", *(f"seed {seed}" for seed in seeds), title="study cells", title_justify="left")
    state = {job.title: word for word, jobs in _by_state(outcome).items() for job in jobs}
    state |= {one.job.title: "running" for one in running}
    if others:
        shown.add_row("before", ", ".join(f"{job.title}: {state.get(job.title, 'waiting')}" for job in others))
    by_arm: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        by_arm.setdefault(cell.arm.name, {})[cell.seed] = cell
    for name, by_seed in by_arm.items():
        shown.add_row(name, *(_words(by_seed[seed], state.get(by_seed[seed].job.title, "waiting")) for seed in seeds))
    return shown


def _by_state(outcome: Outcome) -> dict[str, list[Job]]:
    return {"done": outcome.finished, "failed": outcome.failed, "skipped": outcome.skipped}


def _words(cell: Cell, state: str) -> str:
    if state not in ("running", "done"):
        return state
    try:
        run = load_run(cell.job.folder)
    except GspoMoeError:  # not there yet
        return state
    if "reward/mean" not in run.names:
        return state
    step, reward = run.steps("reward/mean")[-1], run.values("reward/mean")[-1]
    held_out = run.final("eval/reward")
    evaluated = f", held out {held_out:.3f}" if math.isfinite(held_out) else ""
    return (f"{reward:.3f}" if state == "done" else f"{step}/{cell.steps} {reward:.3f}") + evaluated
