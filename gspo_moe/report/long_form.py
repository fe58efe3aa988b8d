"""The numbers behind a report as CSV in long form: one line a value."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from gspo_moe.files import write_whole
from gspo_moe.report.collect import Collection

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
COLUMNS = ("arm", "seed", "metric", "step", "value")


def write_csv(path: Path, collection: Collection) -> int:
    """Writes every value of every run in full precision, NaN as `nan`; returns how many lines follow the header.

    A name that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    lines = 0
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for arm in collection.arms:
            for cell in arm.cells:
                for name in cell.run.names:
                    steps, values = cell.run.series[name]
                    writer.writerows(
                        (_inert(arm.name), cell.seed, _inert(name), step, value)
                        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
                    )
                    lines += len(steps)
        # Lone surrogates, which a name may hold, become question marks.
        write_whole(path, file.getvalue().encode("utf-8", errors="replace"))
    return lines


def _inert(name: str) -> str:
    """https://owasp.org/www-community/attacks/CSV_Injection"""
    return f"'{name}" if name.startswith(FORMULA) else name
