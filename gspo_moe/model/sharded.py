"""Weights as megatron-core's distributed checkpoints hold them: whole tensors that any layout reads its own parts of.

megatron-core stacks a tensor of all layers (and of all experts) under one key; a `Shard` says which part of it a
parameter of this rank is. The vocabulary's padding differs between layouts and is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from gspo_moe.config.architecture import Architecture
from gspo_moe.errors import CheckpointError, GspoMoeError
from gspo_moe.model.build import Model
from gspo_moe.model.names import VALUE_HEAD
from gspo_moe.model.verifying import COPY_AGAIN, check_checkpoint
from gspo_moe.model.weights import problem_list
from gspo_moe.parallel.reduce import gather_objects

Shard: TypeAlias = ShardedTensor | ShardedTensorFactory
P = TypeVar("P", bound=torch.Tensor)

MISFIT = "these tensors do not fit the model; give a complete checkpoint of it"
OPTIMIZER = "optimizer."  # what every key of the optimizer's tensors begins with


def weight_shards(model: Model) -> dict[torch.nn.Parameter, Shard]:
    """Which part of which stored tensor each parameter of this rank is."""
    states = [chunk.sharded_state_dict() for chunk in model.gpt_chunks]
    # Layers' extra states, which are left out, are empty unless weights are fp8.
    shards = {s.data: s for state in states for s in state.values() if isinstance(s, Shard)}
    assert shards.keys() == {parameter for chunk in model.gpt_chunks for parameter in chunk.parameters()}
    return shards


def stored(shard: Shard) -> list[ShardedTensor]:
    """The pieces that are written for a parameter: experts one by one, `linear_fc1` as its gate and its up half."""
    return list(nested_values({"built": shard.build()})) if isinstance(shard, ShardedTensorFactory) else [shard]


def with_data(shard: Shard, data: torch.Tensor, **changes: Any) -> Shard:
    """The same part of a stored tensor, to be written from or read into `data` of the parameter's shape."""
    if not isinstance(shard, ShardedTensorFactory):
        changes["dtype"] = data.dtype
    return replace(shard, data=data, **changes)


@torch.no_grad()
def load_stored_weights(model: Model, path: Path) -> None:
    """Fills every parameter of this rank from a checkpoint of any layout, in the parameter's own dtype. Collective.

    A value head that the checkpoint does not hold stays as it is. Raises CheckpointError where it cannot be read or
    holds other tensors than the model's, or values that are not finite in that dtype; the message names up to ten.
    """
    check_checkpoint(path)
    shards = weight_shards(model)
    if VALUE_HEAD not in stored_tensors(path):
        shards = {parameter: shard for parameter, shard in shards.items() if shard.key != VALUE_HEAD}
    check_stored(path, shards.values(), model.architecture)
    for parameter, value in read_shards(path, shards).items():
        parameter.copy_(value)
    problems = [one for chunk in model.gpt_chunks for one in not_finite(chunk.named_parameters())]
    raise_together(path, MISFIT, problems)


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Which tensors, read from a checkpoint into the dtype they have, hold values that are not finite in it."""
    bad = [(name, value.dtype) for name, value in tensors if not value.isfinite().all()]
    return [f"{name}: holds values that are not finite in {dtype}" for name, dtype in bad]


def read_shards(path: Path, shards: Mapping[P, Shard]) -> dict[P, torch.Tensor]:
    """New tensors with what is stored for each shard; the ranks may ask for different ones. Collective.

    What the checkpoint has lost of a tensor is NaN; rows of the vocabulary beyond the stored ones are zero.
    """
    found = {parameter: torch.full_like(parameter, float("nan"), device="cpu") for parameter in shards}
    pieces = [piece for parameter, shard in shards.items() for piece in stored(with_data(shard, found[parameter]))]
    wanted = {str(number): _by_itself(piece) for number, piece in enumerate(pieces)}
    with checkpoint_errors(path, "loaded", COPY_AGAIN):
        from gspo_moe.model.reading import load  # not above: see `checkpoint_errors`

        load(wanted, path, validate_access_integrity=False)
    return found


def _by_itself(piece: ShardedTensor) -> ShardedTensor:
    """A piece over the same memory that one process may read without the others that are stacked with it.

    As a part of a regular grid, megatron-core takes every place of the grid for some rank's and finds none in one.
    """
    shape = stored_shape(piece)
    return replace(piece, data=piece.data.view(shape), local_shape=shape, prepend_axis_num=0, axis_fragmentations=None)


def stored_tensors(path: Path) -> dict[str, ShardedTensor]:
    """Key, shape and dtype of every weight in a checkpoint, without its data."""
    with checkpoint_errors(path, "loaded", COPY_AGAIN):
        from gspo_moe.model.reading import load_tensors_metadata  # not above: see `checkpoint_errors`

        found = load_tensors_metadata(path)
    return {key: tensor for key, tensor in found.items() if not key.startswith(OPTIMIZER)}


def check_stored(path: Path, shards: Iterable[Shard], architecture: Architecture) -> None:
    """Raises CheckpointError that names what is missing, unknown to the model or of another shape. Collective."""
    found = stored_tensors(path)
    pieces = [piece for shard in shards for piece in stored(shard)]
    problems = {}
    for piece in pieces:
        if piece.key not in found:
            problems[piece.key] = f"{piece.key}: missing"
        elif not _fits(piece, found[piece.key].global_shape, architecture.vocab_size):
            shape, own = found[piece.key].global_shape, piece.global_shape
            problems[piece.key] = f"{piece.key}: shape {list(shape)}, not {list(own)}"
    # Another stage's tensors are unknown to this one, but not to all.
    known = gather_objects({piece.key for piece in pieces})
    extra = found.keys() - {VALUE_HEAD}.union(*known)
    unknown = [f"{key}: the architecture has no such tensor" for key in sorted(extra)]
    raise_together(path, MISFIT, [*problems.values(), *unknown])


def _fits(piece: ShardedTensor, shape: tuple[int, ...], vocab_size: int) -> bool:
    if not piece.allow_shape_mismatch:
        return bool(piece.global_shape == shape)
    return shape[0] >= vocab_size and shape[1:] == piece.global_shape[1:]  # another layout's padding


def raise_together(where: object, what: str, problems: list[str], kind: type[GspoMoeError] = CheckpointError) -> None:
    """Raises one error on every rank for what any of them found. Collective."""
    found = gather_objects(problems)
    unique = list(dict.fromkeys(problem for part in found for problem in part))
    if unique:
        raise kind(problem_list(where, what, unique))


@contextlib.contextmanager
def checkpoint_errors(path: Path, doing: str, fix: str) -> Iterator[None]:
    """Turns whatever reading or writing a checkpoint raises into a CheckpointError that says what to do."""
    try:
        yield
    except BaseException as error:
        # Here, not above: it takes a second to import, and a new run reads no checkpoint.
        from torch.distributed.checkpoint.api import CheckpointException

        # Damaged files raise almost anything, torch's CheckpointException, which is no Exception, among it.
        if not isinstance(error, Exception | CheckpointException):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise CheckpointError(f"{path} cannot be {doing} ({reason}); {fix}") from error


def stored_shape(piece: ShardedTensor) -> tuple[int, ...]:
    """Of a piece with the axes that it is stacked along."""
    return (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
