"""The command `gspo-moe parity`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gspo_moe.errors import ConfigError
from gspo_moe.garbage import imports

COLUMNS = ("processes: layout, precision", "log-prob max", "mean", "k3", "slots, %", "any layer, %", "")


def add_parity(commands: Any) -> None:
    """Adds it to argparse's subparsers."""
    command = commands.add_parser("parity", help="one model in many layouts and precisions: do the numbers agree?")
    command.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    command.add_argument(
        "--data", type=Path, metavar="IN.jsonl", help="lines as `score` reads (default: random tokens)"
    )
    command.add_argument("--processes", type=int, metavar="N", help="at most (default: the GPUs, or two on a CPU)")
    command.add_argument(
        "--layout", action="append", metavar="SIZES", help="'tensor=2 expert=2', in place of the sweep"
    )
    command.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], metavar="TYPE", help="(default: fp32 bf16)")
    command.add_argument("--backends", nargs="+", default=["auto"], metavar="NAME", help="local, transformer_engine")
    for name, help_text in (
        ("log-prob", "largest change of a log-prob, nats (default: 1e-4)"),
        ("slots", "share of expert slots changed (default: 1e-3)"),
        ("k3", "mean exp(d) - 1 - d (default: 1e-6)"),
        ("rounded-slots", "as --slots, where it or the first is in bf16 (default: 0.1)"),
        ("rounded-k3", "as --k3, where it or the first is in bf16 (default: 1e-2)"),
    ):
        command.add_argument(f"--{name}", type=float, metavar="X", help=help_text)
    command.set_defaults(run=_parity)


def _parity(options: argparse.Namespace) -> None:
    with imports():
        import torch

        from gspo_moe.scoring.parity import Case, Tolerances, cases, parity, parse_layout

    most = options.processes or (torch.cuda.device_count() or min(2, os.cpu_count() or 1))
    if most < 1:
        raise ConfigError(f"--processes {most}: give a whole number from 1 up")
    if set(options.dtypes) - {"fp32", "bf16"}:
        raise ConfigError(f"--dtypes {' '.join(options.dtypes)}: choose of fp32 and bf16")
    sweep = cases(most, options.dtypes, options.backends)
    if options.layout:
        asked = [parse_layout(text, options.dtypes, options.backends) for text in options.layout]
        sweep = [Case(1, {}, options.dtypes[0], options.backends[0]), *(case for one in asked for case in one)]
    names = ("log_prob", "slots", "k3", "rounded_slots", "rounded_k3")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    tolerances = Tolerances(**given)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for case, found, verdict in parity(options.model, options.data, sweep, most, tolerances):
        if found is None:
            print(f"| {case} | - | - | - | - | - | {verdict} |", flush=True)
            continue
        values = (
            found.log_prob_max,
            found.log_prob_mean,
            found.k3,
            100 * found.slot_change,
            100 * found.any_layer_flip,
        )
        shown = " | ".join(f"{value:.2g}" for value in values)
        print(f"| {case} | {shown} | {verdict} |", flush=True)
