from __future__ import annotations

import io

from rich.console import Console

from gspo_moe.observability.summary import summary_table


def _rows(before: dict[str, float], after: dict[str, float], last: dict[str, float]) -> list[list[str]]:
    stream = io.StringIO()
    Console(file=stream, width=100).print(summary_table(before, after, last))
    return [[cell for cell in line.strip().split("  ") if cell] for line in stream.getvalue().splitlines()]


def test_gain_is_in_points_and_the_last_step_follows() -> None:
    rows = _rows(
        {"eval/accuracy": 0.21, "eval/reward": 0.25},
        {"eval/accuracy": 0.485, "eval/reward": 0.2},
        {
            "reward/mean": 0.5,
            "clip_fraction/sequence": 0.32,
            "clip_fraction/token": 0.003,
            "routing/staleness/slot_change": 0.0037,
            "throughput/tokens_per_second": 2512.4,
            "rollout/tokens_per_second": 9000,
        },
    )
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["before", "after", "gain"],
        ["held-out accuracy", "21.0%", "48.5%", "+27.5 points"],
        ["held-out reward", "0.250", "0.200", "-0.050"],
        ["reward, last step", "0.500"],
        ["clipped sequences", "32.00%"],
        ["clipped tokens", "0.30%"],
        ["expert slots changed", "0.37%"],
        ["tokens/s, whole step", "2,512"],
        ["tokens/s, generation", "9,000"],
    ]


def test_what_was_measured_once_is_a_dash_and_what_was_not_has_no_row() -> None:
    rows = _rows({}, {"eval/accuracy": 0.5}, {"sft/loss": 0.25})
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["before", "after", "gain"],
        ["held-out accuracy", "-", "50.0%", "-"],
        ["loss, last step", "0.250"],
    ]
