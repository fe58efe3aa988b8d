"""The command `gspo-moe replay`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gspo_moe.garbage import imports


def add_replay(commands: Any) -> None:
    """Adds it to argparse's subparsers."""
    command = commands.add_parser("replay", help="computes a skipped mini-batch again, and where it first breaks")
    command.add_argument("dump", type=Path, metavar="DUMP", help="a file of the folder skipped of the run")
    command.add_argument(
        "--weights", type=Path, metavar="DIR", help="of weights or a checkpoint, where the run kept none beside it"
    )
    command.set_defaults(run=_replay)


def _replay(options: argparse.Namespace) -> None:
    with imports():
        from gspo_moe.parallel.groups import shut_down
        from gspo_moe.replay.replay import check, replay
        from gspo_moe.replay.shown import shown

    try:
        found = replay(options.dump, options.weights)
    finally:
        shut_down()
    if int(os.environ.get("RANK", "0")) == 0:
        print(*shown(found), sep="\n")
    check(found)
