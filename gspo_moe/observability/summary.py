"""The short table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

COMPARED = (
    ("held-out accuracy", "eval/accuracy", "{:.1%}", "{:+.1f} points", 100.0),
    ("held-out reward", "eval/reward", "{:.3f}", "{:+.3f}", 1.0),
)
LAST_STEP = (
    ("loss, last step", "sft/loss", "{:.3f}"),
    ("token accuracy, last step", "sft/token_accuracy", "{:.1%}"),
    ("reward, last step", "reward/mean", "{:.3f}"),
    ("clipped sequences", "clip_fraction/sequence", "{:.2%}"),
    ("clipped tokens", "clip_fraction/token", "{:.2%}"),
    ("expert slots changed", "routing/staleness/slot_change", "{:.2%}"),
    ("tokens/s, whole step", "throughput/tokens_per_second", "{:,.0f}"),
    ("tokens/s, generation", "rollout/tokens_per_second", "{:,.0f}"),
)
ABSENT = "-"


def summary_table(before: Mapping[str, float], after: Mapping[str, float], last: Mapping[str, float]) -> Table:
    """before, after: held-out metrics at start and end. last: metrics of the last step. No row for what is absent."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("before", "after", "gain"):
        table.add_column(title, justify="right")
    for label, name, form, gain_form, scale in COMPARED:
        if name not in before and name not in after:
            continue
        both = name in before and name in after
        gain = gain_form.format(scale * (after[name] - before[name])) if both else ABSENT
        table.add_row(label, _shown(before, name, form), _shown(after, name, form), gain)
    for label, name, form in LAST_STEP:
        if name in last:
            table.add_row(label, "", _shown(last, name, form), "")
    return table


def _shown(metrics: Mapping[str, float], name: str, form: str) -> str:
    return form.format(metrics[name]) if name in metrics else ABSENT


def short_count(number: int) -> str:
    """Three digits, as 30.5 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
