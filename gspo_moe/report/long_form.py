"""The numbers behind a report as CSV in long form: one line a value."""

from __future__ import annotations

import csv
from pathlib import Path

from gspo_moe.report.collect import Collection

COLUMNS = ("arm", "seed", "metric", "step", "value")


def write_csv(path: Path, collection: Collection) -> int:
    """Writes every value of every run in full precision, NaN as `nan`; returns how many lines follow the header."""
    lines = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for arm in collection.arms:
            for cell in arm.cells:
                for name in cell.run.names:
                    steps, values = cell.run.series[name]
                    writer.writerows(
                        (arm.name, cell.seed, name, step, value)
                        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
                    )
                    lines += len(steps)
    return lines
