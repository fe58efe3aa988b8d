"""Log-probs, values and routes of given sequences: one forward pass through the training model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording, run
from gspo_moe.model.inputs import microbatch_input, response_positions
from gspo_moe.model.last_stage import LastStage
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.routing.recorder import Watching
from gspo_moe.routing.replay import Replayed, replay
from gspo_moe.types import Microbatch

T = TypeVar("T")


def score(
    model: Model,
    microbatches: Sequence[Microbatch],
    *,
    temperature: float = 1.0,
    record: Watching | None = None,
    routes: Sequence[torch.Tensor | Replayed] | None = None,
    depth: int | None = None,
    responses_only: bool = False,
) -> list[torch.Tensor]:
    """Log-probs [T] (fp32, nats) of each pack's targets at `temperature`; on the last pipeline stage, else empty.

    Under context parallelism each rank runs its own tokens and gets every token's log-probs. record: keeps the
    routes of this forward. routes, depth: what to replay, as `routing.replay` takes it. responses_only: spares the
    other tokens the output layer; their log-probs are 0.
    """

    def read(stage: LastStage, log_probs_C: torch.Tensor, split: ContextSplit) -> torch.Tensor:
        return split.whole(log_probs_C)

    return _pass(model, microbatches, read, temperature, record, routes, depth, responses_only)


def score_with_values(
    model: Model,
    microbatches: Sequence[Microbatch],
    *,
    temperature: float = 1.0,
    record: Watching | None = None,
    routes: Sequence[torch.Tensor | Replayed] | None = None,
    responses_only: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `score`, and beside the log-probs the value head's V [T] (fp32) of what stands before each target."""

    def read(stage: LastStage, log_probs_C: torch.Tensor, split: ContextSplit) -> tuple[torch.Tensor, torch.Tensor]:
        return split.whole(log_probs_C), split.whole(stage.values())

    return _pass(model, microbatches, read, temperature, record, routes, None, responses_only)


def _pass(
    model: Model,
    microbatches: Sequence[Microbatch],
    read: Callable[[LastStage, torch.Tensor, ContextSplit], T],
    temperature: float,
    record: Watching | None,
    routes: Sequence[torch.Tensor | Replayed] | None,
    depth: int | None,
    responses_only: bool,
) -> list[T]:
    splits = [ContextSplit(microbatch.cu_seqlens, model.groups.context) for microbatch in microbatches]
    positions = [
        response_positions(*each) if responses_only else None for each in zip(microbatches, splits, strict=True)
    ]

    def head(index: int, stage: LastStage) -> tuple[None, T]:
        split = splits[index]
        targets_C = split.local(microbatches[index].target_ids_T)
        found = stage.log_probs(targets_C, temperature, positions_N=positions[index])
        return None, read(stage, found.log_probs, split)

    inputs = [microbatch_input(*each) for each in zip(microbatches, splits, strict=True)]
    recording = no_recording if record is None else record.scope
    with replay(model.chunks, model.groups, routes, recording, depth) as scope:
        return run(model, inputs, head, backward=False, record=scope)
