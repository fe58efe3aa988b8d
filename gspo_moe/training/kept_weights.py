"""Weights alone, finite or not, in the format of checkpoints: what a skipped mini-batch was computed with."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from gspo_moe.errors import GspoMoeError
from gspo_moe.files import replace_folder, stage, stage_folder
from gspo_moe.garbage import uncollected
from gspo_moe.model.build import Model
from gspo_moe.model.sharded import check_stored, read_shards, weight_shards
from gspo_moe.model.verifying import MARK, add_manifest, check_checkpoint
from gspo_moe.parallel.stop import WorkError, on_main


def keep_weights(folder: Path, model: Model) -> str | None:
    """Writes the model's weights, in place of what lies there; why they cannot be written, in words. Collective."""
    # Here, not above: torch's writer takes a second to import.
    from gspo_moe.model.writing import begin_state

    shards = {str(number): shard for number, shard in enumerate(weight_shards(model).values())}
    try:
        with uncollected():
            on_main(lambda: stage_folder(folder))
            writing = begin_state(stage(folder), {"weights": shards, MARK: True}, copied=False)
            writing.write()
            add_manifest(stage(folder), {}, writing.finish())
            on_main(lambda: replace_folder(stage(folder), folder))
    except (GspoMoeError, OSError, WorkError) as error:
        if model.groups.is_main:
            shutil.rmtree(stage(folder), ignore_errors=True)
        return str(error)
    return None


@torch.no_grad()
def load_kept_weights(folder: Path, model: Model) -> None:
    """Fills every parameter of this rank, whatever layout wrote them; NaN and infinities are taken too. Collective.

    folder: of `keep_weights`, or a checkpoint. Raises CheckpointError where it cannot be read or is another model's.
    """
    check_checkpoint(folder)
    shards = weight_shards(model)
    check_stored(folder, shards.values(), model.architecture)
    for parameter, value in read_shards(folder, shards).items():
        parameter.copy_(value)
