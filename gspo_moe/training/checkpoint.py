"""Checkpoints in megatron-core's distributed format: weights, Adam's state, generators, data position, step.

Any layout reads what any other wrote; only the generators' state is left out where the layouts differ.

Invariant: a folder named `step_<8 digits>` is complete. It is written as `step_<8 digits>.partial` and renamed when
every rank is done, so a run killed at any moment leaves the newest complete one as it was; one that goes is renamed
back before it is removed.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from gspo_moe.config.architecture import Architecture, architecture_from_hf
from gspo_moe.config.checkpoints import checkpoint_name, remove, superseded, unfinished, unfinished_checkpoints
from gspo_moe.data.prompts import PromptPosition
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import CheckpointError, DamagedCheckpoint, GspoMoeError, SaveError
from gspo_moe.files import replace_folder
from gspo_moe.garbage import uncollected
from gspo_moe.model.build import Model
from gspo_moe.model.hf import write_config
from gspo_moe.model.sharded import checkpoint_errors, weight_shards
from gspo_moe.model.verifying import MARK, add_manifest, check_checkpoint
from gspo_moe.parallel.groups import Groups
from gspo_moe.parallel.stop import WorkError, on_main
from gspo_moe.training.optimizer import Optimizer

if TYPE_CHECKING:
    from gspo_moe.model.writing import Writing

_log = logging.getLogger(__name__)
_FIX = (
    "start from its weights alone with model.checkpoint, or, if its files are damaged, copy them again, or move it "
    "elsewhere to go on from the one before"
)


@dataclass(frozen=True)
class Progress:
    """step: finished steps. policy_version: optimizer updates so far.

    prompt_position, prompts_pending: `PromptPosition`'s `next` and `pending`.
    evaluation_due: the evaluation that follows this step is still to come.
    """

    step: int = 0
    prompt_position: int = 0
    policy_version: int = 0
    evaluation_due: bool = False
    prompts_pending: tuple[int, ...] = ()

    @property
    def prompts(self) -> PromptPosition:
        return PromptPosition(self.prompt_position, self.prompts_pending)


@dataclass(frozen=True)
class Destination:
    """Where a run's checkpoints go, and which of them stay: as `config/checkpoints.superseded` has it.

    tokenizer: whose end tokens a checkpoint's config.json names. run: whose checkpoints they are.
    patience: seconds for which a writer in the background is waited for.
    """

    folder: Path
    keep: int
    keep_every: int = 0
    tokenizer: Tokenizer | None = None
    run: str | None = None
    patience: float = 300.0


class BegunSave:
    """A checkpoint whose state is set down, and which is not in its place yet."""

    def __init__(self, target: Path, writing: Writing, place: Destination, *, background: bool) -> None:
        self._target, self._writing, self._place = target, writing, place
        # A daemon: a run that breaks off waits for no disk, and the checkpoint before is whole.
        self._thread = threading.Thread(target=writing.write, name="checkpoint", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> Path:
        """Waits until all is written, puts the checkpoint in its place and removes what it replaces. Collective.

        Raises SaveError where it could not be written, which then leaves nothing behind.
        """
        with _save_errors(self._target), uncollected():
            if self._thread is not None:
                self._thread.join(self._place.patience)
                if self.is_writing:
                    self._writing.abandon(f"its writer was not done {self._place.patience:g} s after it was waited for")
            else:
                self._writing.write()
            sums = self._writing.finish()
            add_manifest(unfinished(self._target), {"run": self._place.run, "name": self._target.name}, sums)
            on_main(self._put_in_place)
        return self._target

    def _put_in_place(self) -> None:
        replace_folder(unfinished(self._target), self._target)
        for old in superseded(self._place.folder, self._place.keep, self._place.keep_every):
            try:
                remove(old)
            except OSError as error:
                _log.warning("%s cannot be removed (%s), and takes room", old, error)


def begin_save(
    place: Destination, model: Model, optimizer: Optimizer, progress: Progress, *, background: bool = False
) -> BegunSave:
    """Sets down what a checkpoint holds, for `BegunSave.finish` to write or, with `background`, for a thread meanwhile.

    Until then the state must not change, but for `background`, which copies it into host memory. Nothing but what
    `config/checkpoints.py` names is counted or removed. Collective over all ranks. Raises SaveError.
    """
    # Here, not above: torch's writer takes a second to import, which is not to delay a run's first step.
    from gspo_moe.model.writing import begin_state

    target = place.folder / checkpoint_name(progress.step)
    state = _state(model, optimizer, loading=False)
    state["progress"] = asdict(progress)
    state["adam_steps"] = optimizer.adam_steps
    state["predictor_steps"] = 0 if optimizer.predictor is None else optimizer.predictor.steps
    state["layout"] = asdict(model.groups.layout)
    state["dtype"] = str(model.config.params_dtype)
    state[MARK] = True

    def prepare() -> None:
        for stale in unfinished_checkpoints(place.folder):
            shutil.rmtree(stale)
        unfinished(target).mkdir(parents=True)
        write_config(unfinished(target), model.architecture, model.config.params_dtype, place.tokenizer)

    with _save_errors(target), uncollected():
        on_main(prepare)
        return BegunSave(
            target, begin_state(unfinished(target), state, copied=background), place, background=background
        )


def save_checkpoint(
    folder: Path,
    model: Model,
    optimizer: Optimizer,
    progress: Progress,
    keep: int,
    tokenizer: Tokenizer | None = None,
    run: str | None = None,
) -> Path:
    """Writes a checkpoint, then removes all but the `keep` newest (0: none). Collective. Raises SaveError."""
    return begin_save(Destination(folder, keep, 0, tokenizer, run), model, optimizer, progress).finish()


@contextlib.contextmanager
def _save_errors(target: Path) -> Iterator[None]:
    """Of what all ranks raise at once; a full disk gets its room back."""
    try:
        yield
    except (GspoMoeError, OSError, WorkError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished(target), ignore_errors=True)
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise SaveError(f"{target} could not be written ({cause})") from cause


@torch.no_grad()
def load_checkpoint(path: Path, model: Model, optimizer: Optimizer, run: str | None = None) -> Progress:
    """Puts a checkpoint's state into model and optimizer, whatever layout wrote it. Collective over all ranks.

    run: whose checkpoint it must be, where it tells and that is known; the first rank's counts.
    Raises CheckpointError where the checkpoint is of another architecture or dtype, DamagedCheckpoint where its files
    are not those that the run wrote there; then nothing was loaded.
    """
    if on_main(path.is_symlink):
        raise DamagedCheckpoint(f"{path} is a symbolic link, which no run makes; put the checkpoint itself there")
    check_checkpoint(path, {"run": run, "name": path.name}, fix="")
    # Here, not above: torch's reader takes a second to import.
    from gspo_moe.model.reading import load, load_common

    with checkpoint_errors(path, "loaded", _FIX):
        common = load_common(path)
    if "progress" not in common:
        raise CheckpointError(f"{path} was not written by gspo_moe; give another logging.run_dir")
    with checkpoint_errors(path, "loaded", _FIX):
        saved = architecture_from_hf(path)
    _check_model(path, saved, common["dtype"], model)
    same_layout = common["layout"] == asdict(model.groups.layout)
    state = _state(model, optimizer, loading=True)
    if not same_layout:
        del state["rng"]
    with checkpoint_errors(path, "loaded", _FIX), uncollected():
        found = load(state, path)
    for number, parameter in enumerate(weight_shards(model)):
        parameter.copy_(found["weights"][str(number)])
    progress = Progress(**common["progress"])
    steps = common["adam_steps"], progress.policy_version, common.get("predictor_steps", 0)
    optimizer.restore(found["optimizer"], *steps)
    if same_layout:
        _set_rng_state(found["rng"])
    elif model.groups.is_main:
        _log.warning("%s was written in another layout: random number generators start from the seed again", path)
    return progress


def _state(model: Model, optimizer: Optimizer, *, loading: bool) -> dict[str, Any]:
    weights = weight_shards(model)
    return {
        "weights": {str(number): shard for number, shard in enumerate(weights.values())},
        "optimizer": optimizer.shards(weights, loading=loading),
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


def _check_model(path: Path, saved: Architecture, dtype: str, model: Model) -> None:
    mine = model.architecture.model_dump()
    changed = [
        f"{name} is {value} there and {mine[name]} here"
        for name, value in saved.model_dump().items()
        if value != mine[name]
    ]
    if changed:
        raise CheckpointError(
            f"{path} holds another model ({'; '.join(changed)}); give another logging.run_dir or the same model"
        )
    if dtype != str(model.config.params_dtype):
        raise CheckpointError(
            f"{path} was trained in {dtype} and this run is in {model.config.params_dtype}; resume with the same "
            "model.dtype, or start another run from its weights with model.checkpoint"
        )
