"""`gspo-moe report`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gspo_moe import garbage
from gspo_moe.errors import ConfigError


def add_report(commands: Any) -> None:
    command = commands.add_parser("report", help="one HTML page of runs and studies: curves, routing, samples")
    command.add_argument("paths", nargs="+", metavar="PATH", help="folder of a run, or of a study (ARM/seed1, ...)")
    command.add_argument("--output", type=Path, metavar="FILE.html", help="the page, in one file, over an earlier one")
    command.add_argument("--figures", type=Path, metavar="DIR", help="its figures as PNG and SVG, over earlier ones")
    command.add_argument("--csv", type=Path, metavar="FILE", help="every number in long form; replaces an earlier one")
    command.add_argument("--watch", action="store_true", help="serve the page on this machine while the runs go on")
    command.add_argument("--port", type=int, default=8321, help="for --watch; 0 takes a free one (default: 8321)")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    with garbage.imports():
        from gspo_moe.report.build import build_report
        from gspo_moe.report.server import serve

    wanted = (options.output, options.figures, options.csv)
    if not options.watch and not any(wanted):
        raise ConfigError("say what to write: --output FILE.html, --figures DIR, --csv FILE, or --watch to serve it")
    if any(wanted):
        print(*build_report(options.paths, output=options.output, figures=options.figures, csv=options.csv), sep="\n")
    if options.watch:
        serve(options.paths, options.port)
