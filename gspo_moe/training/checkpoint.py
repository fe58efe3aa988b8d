"""Checkpoints through megatron-core's distributed format: weights, optimizer, RNG, data position, step.

Invariant: a folder named `step_<number>` is complete. It is written as `step_<number>.partial` and renamed when every
rank is done, so a run killed at any moment leaves the newest complete one as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from gspo_moe.errors import CheckpointError
from gspo_moe.model.build import Model
from gspo_moe.parallel.groups import Groups
from gspo_moe.training.optimizer import Optimizer

_COMPLETE = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Progress:
    """step: finished steps. prompt_position: prompts drawn so far. policy_version: optimizer updates so far."""

    step: int = 0
    prompt_position: int = 0
    policy_version: int = 0


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if there is one."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _COMPLETE.fullmatch(path.name))]
    return max(found)[1] if found else None


def save_checkpoint(folder: Path, model: Model, optimizer: Optimizer, progress: Progress, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the `keep` newest. Collective over all ranks."""
    target = folder / f"step_{progress.step:08d}"
    partial = target.with_name(target.name + ".partial")
    if model.groups.is_main:
        for stale in folder.glob("*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _state(model, optimizer, loading=False)
    state["progress"] = asdict(progress)
    state["architecture"] = model.architecture.model_dump()
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if model.groups.is_main:
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        for _, old in sorted((path.name, path) for path in folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load_checkpoint(path: Path, model: Model, optimizer: Optimizer) -> Progress:
    """Puts a checkpoint's state into model and optimizer. Collective over all ranks.

    Raises CheckpointError where the checkpoint is of another architecture, damaged, or of another layout.
    """
    with _readable(path):
        common = dist_checkpointing.load_common_state_dict(str(path))
    _check_architecture(path, common.get("architecture"), model)
    with _readable(path):
        state = dist_checkpointing.load(_state(model, optimizer, loading=True), str(path))
    for index, chunk in enumerate(model.gpt_chunks):
        chunk.load_state_dict(state[f"model_{index}"])
    progress = Progress(**state["progress"])
    optimizer.load(state["optimizer"], progress.policy_version)
    _set_rng_state(state["rng"])
    return progress


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    # Damaged files raise almost anything, torch's CheckpointException, which is no Exception, among it.
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise CheckpointError(
            f"{path} cannot be loaded in this layout ({reason}); resume with the layout that wrote it, start from its "
            "HF export with model.hf, or, if its files are damaged, delete it to go on from the one before"
        ) from error


def _state(model: Model, optimizer: Optimizer, *, loading: bool) -> dict[str, Any]:
    shards = {f"model_{index}": chunk.sharded_state_dict() for index, chunk in enumerate(model.gpt_chunks)}
    return {
        **shards,
        "optimizer": optimizer.sharded_state(shards, loading=loading),
        "rng": _rng_state(model.groups),
    }


def _rng_state(groups: Groups) -> ShardedObject:
    rng = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng", rng, (groups.world_size,), (groups.rank,))


def _set_rng_state(rng: dict[str, Any]) -> None:
    torch.set_rng_state(rng["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(rng["tracker"])
    if "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])


def _check_architecture(path: Path, saved: dict[str, Any] | None, model: Model) -> None:
    mine = model.architecture.model_dump()
    if saved is None:
        raise CheckpointError(f"{path} was not written by gspo_moe; give another logging.run_dir")
    changed = [
        f"{name} is {saved.get(name)} there and {mine[name]} here" for name in mine if saved.get(name) != mine[name]
    ]
    if changed:
        raise CheckpointError(
            f"{path} holds another model ({'; '.join(changed)}); give another logging.run_dir or the same model"
        )
