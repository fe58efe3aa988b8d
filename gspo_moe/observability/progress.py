"""How far the run is, on standard error: a bar on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("FAILED REWARDS", "reward/failure_rate", "{:.1%}"),
    ("clipped", "clip_fraction/sequence", "{:.1%}"),
    ("slot change", "routing/staleness/slot_change", "{:.2%}"),
    ("loss", "sft/loss", "{:.3f}"),
    ("token accuracy", "sft/token_accuracy", "{:.1%}"),
    ("waits", "timing/waiting_seconds", "{:.1f} s"),
    ("servers wait", "queue/idle_seconds", "{:.1f} s"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
)
FAULTS = ("reward/failure_rate",)  # shown where they are not 0


def show_header(rows: Sequence[tuple[str, str]], stream: TextIO | None = None) -> None:
    """A line each, labels in a column of their own, on a terminal and elsewhere alike; on standard error by itself."""
    width = max(len(label) for label, _ in rows)
    lines = "".join(f"{label:<{width}}  {text}\n" for label, text in rows)
    print(lines, end="", file=stream or sys.stderr, flush=True)


class Progress:
    """Use it in a `with`; `update` after each step.

    total: steps of the whole run. done: steps it had taken before this process started.
    enabled: False prints nothing (every rank but one, `logging.progress: false`).
    """

    def __init__(self, total: int, *, done: int = 0, enabled: bool = True, console: Console | None = None) -> None:
        self._total, self._done, self._start = total, done, time.monotonic()
        self._console = console or Console(stderr=True)
        self._plain = enabled and not self._console.is_terminal
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not enabled or self._plain,
        )
        self._task = self._bar.add_task("step", total=total, completed=done, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; shows those of its metrics that matter."""
        shown = [row for row in SHOWN if row[1] in metrics and (metrics[row[1]] or row[1] not in FAULTS)]
        figures = "  ".join(f"{label} {form.format(metrics[name])}" for label, name, form in shown)
        self._bar.update(self._task, completed=step, figures=figures)
        if self._plain:
            left = (time.monotonic() - self._start) / max(1, step - self._done) * (self._total - step)
            text = f"step {step}/{self._total}  {timedelta(seconds=round(left))} left  {figures}"
            self._console.print(text, soft_wrap=True, highlight=False)
