"""How a run names its checkpoints, which alone tells them from what else lies in that folder. Torch-free."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_COMPLETE = re.compile(r"step_\d{8}")
_PARTIAL = re.compile(r"step_\d{8}\.partial")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: folders named `step_` and eight digits, and nothing else.

    A symbolic link counts, wherever it leads, so that it is told of when it is to be read.
    """
    return _folders(folder, _COMPLETE)


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """What killed runs left half written in `folder`: folders named `step_`, eight digits and `.partial`."""
    return [path for path in _folders(folder, _PARTIAL) if not path.is_symlink()]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if there is one."""
    found = checkpoints(folder)
    return found[-1] if found else None


def unfinished(checkpoint: Path) -> Path:
    """What a checkpoint is called while it is written, and while it is removed."""
    return checkpoint.with_name(f"{checkpoint.name}.partial")


def superseded(folder: Path, keep: int, keep_every: int) -> list[Path]:
    """Complete checkpoints neither among the `keep` newest (0: all) nor of every `keep_every`th step (0: of none)."""
    older = [path for path in checkpoints(folder)[:-keep] if not path.is_symlink()]  # which no run makes
    return [path for path in older if not keep_every or int(path.name.removeprefix("step_")) % keep_every]


def remove(checkpoint: Path) -> None:
    """Whatever ends it in the middle, what is left is named as unfinished."""
    checkpoint.rename(unfinished(checkpoint))
    shutil.rmtree(unfinished(checkpoint))


def set_aside(checkpoint: Path, why: str = "damaged") -> Path:
    """Renames a checkpoint, so that no run goes on from it or removes it; where it is then."""
    taken = checkpoint.with_name(f"{checkpoint.name}.{why}")
    number = 1
    while taken.exists() or taken.is_symlink():
        number += 1
        taken = checkpoint.with_name(f"{checkpoint.name}.{why}{number}")
    checkpoint.rename(taken)
    return taken


def _folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    named = (path for path in folder.glob("step_*") if name.fullmatch(path.name))
    return sorted(path for path in named if path.is_dir() or path.is_symlink())
