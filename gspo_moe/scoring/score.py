"""Log-probs, values and routes of given sequences: one forward pass through the training model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording, run
from gspo_moe.model.inputs import microbatch_input
from gspo_moe.model.last_stage import LastStage
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.routing.recorder import RoutePass
from gspo_moe.routing.replay import replay
from gspo_moe.types import Microbatch

T = TypeVar("T")


def score(
    model: Model,
    microbatches: Sequence[Microbatch],
    *,
    temperature: float = 1.0,
    record: RoutePass | None = None,
    routes: Sequence[torch.Tensor] | None = None,
    depth: int | None = None,
) -> list[torch.Tensor]:
    """Log-probs [T] (fp32, nats) of each pack's targets at `temperature`; on the last pipeline stage, else empty.

    Under context parallelism each rank runs its own tokens and gets every token's log-probs. record: keeps the
    routes of this forward. routes, depth: what to replay, as `routing.replay` takes it.
    """

    def read(stage: LastStage, targets_C: torch.Tensor, split: ContextSplit) -> torch.Tensor:
        return split.whole(stage.log_probs(targets_C, temperature).log_probs)

    return _pass(model, microbatches, read, record, routes, depth)


def score_with_values(
    model: Model,
    microbatches: Sequence[Microbatch],
    *,
    temperature: float = 1.0,
    record: RoutePass | None = None,
    routes: Sequence[torch.Tensor] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `score`, and beside the log-probs the value head's V [T] (fp32) of what stands before each target."""

    def read(stage: LastStage, targets_C: torch.Tensor, split: ContextSplit) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs_C = stage.log_probs(targets_C, temperature).log_probs
        return split.whole(log_probs_C), split.whole(stage.values())

    return _pass(model, microbatches, read, record, routes, None)


def _pass(
    model: Model,
    microbatches: Sequence[Microbatch],
    read: Callable[[LastStage, torch.Tensor, ContextSplit], T],
    record: RoutePass | None,
    routes: Sequence[torch.Tensor] | None,
    depth: int | None,
) -> list[T]:
    splits = [ContextSplit(microbatch.cu_seqlens, model.groups.context) for microbatch in microbatches]

    def head(index: int, stage: LastStage) -> tuple[None, T]:
        split = splits[index]
        return None, read(stage, split.local(microbatches[index].target_ids_T), split)

    inputs = [microbatch_input(*each) for each in zip(microbatches, splits, strict=True)]
    recording = no_recording if record is None else record.scope
    with replay(model.chunks, model.groups, routes, recording, depth) as scope:
        return run(model, inputs, head, backward=False, record=scope)
