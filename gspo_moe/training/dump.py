"""What a mini-batch held whose update was skipped, for `gspo-moe replay`: in the folder `skipped` of the run.

`step_S_mini_batch_K_rank_R.safetensors`, one a data-parallel rank: tensors are those of `types.Microbatch` and what
training knew beside them, `pack_0/input_ids_T` and so on, routes of all layers; the metadata's `minibatch` is JSON, the
fields of `Described`. `weights_step_S_mini_batch_K` has the weights that it was computed with, once for all
mini-batches in a row that leave them as they are.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, A all MoE layers, K experts a token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gspo_moe.files import write_whole
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.routing.comparison import gather_layers
from gspo_moe.routing.recorder import routers_of
from gspo_moe.routing.shards import StageLayers
from gspo_moe.training.kept_weights import keep_weights
from gspo_moe.training.packs import Minibatch, TrainingPack
from gspo_moe.training.session import Trainer
from gspo_moe.training.step import MinibatchResult, SupervisedResult
from gspo_moe.types import Microbatch

FOLDER = "skipped"
MOST = 20  # files a rank keeps: all of a run's may be skipped
MOST_WEIGHTS = 2  # as large as the model
OF_OLD_POLICY = ("old_log_probs_T", "reference_log_probs_T")
ESTIMATES = ("advantages_T", "values_T", "returns_T")
_log = logging.getLogger(__name__)
Result = MinibatchResult | SupervisedResult


@dataclass(frozen=True)
class Described:
    """step, mini_batch: from 1. policy_version: of the step's beginning. data_rank, data_ranks: of this file, and all.

    grad_norm, metrics: what the run found, as text, as JSON has no NaN. samples: of each pack, those of the step.
    num_sequences, num_tokens: of the mini-batch over all ranks. vocab: tokens of the tokenizer.
    weights: a folder beside the file; None where they could not be kept. config, architecture: as their `model_dump`.
    """

    step: int
    mini_batch: int
    policy_version: int
    data_rank: int
    data_ranks: int
    grad_norm: str
    metrics: Mapping[str, str]
    num_sequences: int
    num_tokens: int
    samples: list[list[int]]
    vocab: int
    weights: str | None
    config: Mapping[str, Any]
    architecture: Mapping[str, Any]


def dump_name(step: int, mini_batch: int) -> str:
    return f"step_{step:08d}_mini_batch_{mini_batch}"


def dump_skipped(trainer: Trainer, minibatch: Minibatch, result: Result, number: int) -> None:
    """Writes this rank's packs of mini-batch `number`, from 0, as far as the folder has room. Collective.

    The last stage, which has log-probs, writes. A file that cannot be written is no reason to end the run.
    """
    groups, folder = trainer.session.groups, trainer.session.run_path / FOLDER
    name = dump_name(trainer.progress.step + 1, number + 1)
    room = len(list(folder.glob(f"step_*_rank_{groups.rank:05d}.safetensors"))) < MOST
    if not all(gather_objects(room)):
        return
    weights, tensors = _weights(trainer, name), _tensors(trainer, minibatch, result)
    if not groups.is_last_stage or groups.tensor.rank() or groups.context.rank():
        return
    described = json.dumps(asdict(_described(trainer, minibatch, result, number, weights)))
    file = folder / f"{name}_rank_{groups.rank:05d}.safetensors"
    try:
        write_whole(file, lambda partial: save_file(tensors, partial, metadata={"minibatch": described}))
    except (OSError, SafetensorError, RuntimeError) as error:  # the last of copies without memory for them
        _log.warning("%s cannot be written (%s): what the mini-batch held is not kept", file, error)


def _weights(trainer: Trainer, name: str) -> str | None:
    """The folder that has the weights, which are written unless the mini-batch before left them there. Collective."""
    folder, steps = trainer.session.run_path / FOLDER, trainer.optimizer.adam_steps
    if trainer.dumped_weights is not None and trainer.dumped_weights[0] == steps:
        return trainer.dumped_weights[1]
    kept = f"weights_{name}"
    full = len([one for one in folder.glob("weights_*") if one.name != kept]) >= MOST_WEIGHTS
    if not trainer.session.config.checkpoint.keep or gather_objects(full)[0]:
        return None
    fault = keep_weights(folder / kept, trainer.session.model)
    if fault is not None:
        if trainer.session.groups.is_main:
            _log.warning(
                "%s cannot be written (%s): the mini-batch can be replayed with --weights", folder / kept, fault
            )
        return None
    trainer.dumped_weights = (steps, kept)
    return kept


def _described(trainer: Trainer, minibatch: Minibatch, result: Result, number: int, weights: str | None) -> Described:
    session = trainer.session
    return Described(
        step=trainer.progress.step + 1,
        mini_batch=number + 1,
        policy_version=trainer.progress.policy_version,
        data_rank=session.groups.data_rank,
        data_ranks=session.groups.layout.data,
        grad_norm=str(result.update.grad_norm),
        metrics={name: str(value) for name, value in result.statistics.to_metrics().items()},
        num_sequences=minibatch.num_sequences,
        num_tokens=minibatch.num_tokens,
        samples=[list(one.pack.sample_indices) for one in minibatch.packs],
        vocab=session.model.vocab,
        weights=weights,
        config=session.config.model_dump(mode="json"),
        architecture=session.model.architecture.model_dump(mode="json"),
    )


def _tensors(trainer: Trainer, minibatch: Minibatch, result: Result) -> dict[str, torch.Tensor]:
    """Collective over the pipeline."""
    model = trainer.session.model
    indices = tuple(router.layer_number - 1 for router in routers_of(model.chunks))
    layers = StageLayers(indices, model.architecture, model.groups)
    found: dict[str, torch.Tensor] = {}
    for number, (one, trained) in enumerate(zip(minibatch.packs, result.packs, strict=True)):
        values = {field.name: getattr(one.pack, field.name) for field in fields(Microbatch)}
        values |= {name: getattr(one, name) for name in OF_OLD_POLICY} | {"log_probs_T": trained.log_probs_T}
        values |= _routes(one, layers, trainer.session.config.algorithm.spec.router_shift)
        if one.estimates is not None:
            values |= {f"estimates/{name}": getattr(one.estimates, name) for name in ESTIMATES}
            values |= {f"estimates/means/{name}": value for name, value in one.estimates.means._asdict().items()}
        found |= {f"pack_{number}/{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
    # Copies: safetensors takes no two names of the same memory.
    return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}


def _routes(one: TrainingPack, layers: StageLayers, shifts: bool) -> dict[str, torch.Tensor]:
    """Replayed routes, and the old policy's own with scores where the loss weighs by them; of all layers."""
    found = {}
    if one.replay_TLK is not None:
        found["replay_TAK"] = gather_layers(one.replay_TLK, layers)
    if one.gates_TLK is not None:
        found["gates_TAK"] = layers.spread(one.gates_TLK)
    if one.held_TL is not None:
        found["held_TA"] = layers.spread(one.held_TL.int()).bool()
    if shifts and one.recording is not None and one.recording.own is not None:
        found["old_routes_TAK"] = gather_layers(one.recording.routes_TLK, layers)
        found["old_route_log_probs_TAK"] = layers.spread(one.recording.own.log_probs_TLK)
    return found


def files_of(file: Path) -> list[Path]:
    """All files of the mini-batch that `file` is one of, by rank."""
    return sorted(file.parent.glob(f"{file.name.rpartition('_rank_')[0]}_rank_*.safetensors"))
