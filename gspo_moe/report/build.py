"""`gspo-moe report`: the page, the figures and the numbers of runs and studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo_moe.config.outputs import output_fault
from gspo_moe.errors import ConfigError
from gspo_moe.files import write_whole
from gspo_moe.report.collect import collect
from gspo_moe.report.contents import contents
from gspo_moe.report.long_form import write_csv
from gspo_moe.report.page import render_page, seeds_text
from gspo_moe.report.palette import looks
from gspo_moe.report.paper import write_figures


def build_report(
    paths: Sequence[str | Path], *, output: Path | None = None, figures: Path | None = None, csv: Path | None = None
) -> list[str]:
    """Writes what is asked for; returns, in words, what was written and what could not be read.

    Raises ConfigError for what cannot be written, DataError when no run under `paths` can be read.
    """
    files = [output_fault(path) for path in (output, csv) if path is not None]
    folders = [output_fault(path, folder=True) for path in (figures,) if path is not None]
    faults = [fault for fault in (*files, *folders) if fault is not None]
    if faults:
        raise ConfigError("\n".join(faults))
    collection = collect(paths)
    lines = [f"not read: {problem}" for problem in collection.problems]
    if output is not None:
        # Lone surrogates, which a task's text may hold, become question marks.
        write_whole(output, render_page(collection).encode("utf-8", errors="replace"))
        lines.append(f"{output}: {output.stat().st_size / 1e6:.1f} MB, opens in any browser, needs no network")
    if figures is not None:
        drawn = [figure for figure in contents(collection).figures if figure.panels]
        written = write_figures(
            figures,
            drawn,
            looks(list(dict.fromkeys(arm.of for arm in collection.arms))),
            {figure.key: seeds_text(figure, collection) for figure in drawn},
        )
        lines.append(f"{figures}: {len(written)} files, {len(drawn)} figures as PNG and SVG")
    if csv is not None:
        lines.append(f"{csv}: {write_csv(csv, collection)} values")
    return lines
