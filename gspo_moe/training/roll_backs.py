"""How often a run was taken back to an earlier checkpoint: the file `roll_backs.json` of its folder, and what it means.

The file is the run's only memory of it, and a start reads it as the roll-back itself does: at the checkpoint that a run
was taken back to, the prompts come next that no step had used when that happened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gspo_moe.errors import ConfigError
from gspo_moe.files import write_whole
from gspo_moe.plain_json import read_object
from gspo_moe.training.checkpoint import Progress

FILE = "roll_backs.json"


@dataclass(frozen=True)
class RollBack:
    """From step `found` to the checkpoint of step `step`, for `reason`.

    prompt_position, prompts_pending: `Progress`'s at step `found`.
    """

    step: int
    found: int
    prompt_position: int
    reason: str
    prompts_pending: tuple[int, ...] = ()


def read_roll_backs(folder: Path) -> list[RollBack]:
    """Of the run in `folder`, in their order. Raises ConfigError for a file that is not as it was written."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        found = [RollBack(**one) for one in read_object(file)["roll_backs"]]
        return [replace(one, prompts_pending=tuple(one.prompts_pending)) for one in found]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}); put an undamaged copy there, or remove it") from None


def write_roll_backs(folder: Path, found: Sequence[RollBack]) -> None:
    write_whole(folder / FILE, json.dumps({"roll_backs": [asdict(one) for one in found]}, indent=1) + "\n")


def after(found: Sequence[RollBack], progress: Progress) -> Progress:
    """Where a checkpoint's run goes on: one from before the last roll-back has its prompts behind it."""
    if not found or progress.prompt_position >= found[-1].prompt_position:
        return progress
    last = found[-1]
    return replace(progress, prompt_position=last.prompt_position, prompts_pending=last.prompts_pending)
