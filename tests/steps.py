"""Steps on bare packs: what training makes of a step's samples is put together here from lists by pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gspo_moe.algorithms import PolicyStatistics, Segments
from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.model.build import Model
from gspo_moe.routing.recorder import Recording, RouteRecorder
from gspo_moe.routing.replay import Replayed
from gspo_moe.training import step
from gspo_moe.training.critic import Estimates
from gspo_moe.training.optimizer import Optimizer, UpdateResult
from gspo_moe.training.packs import Minibatch, TrainingPack, recordings_of, training_pack, with_each
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class Result:
    """log_probs: on the last stage. routes: where they were recorded. Both by pack."""

    statistics: PolicyStatistics
    update: UpdateResult
    log_probs: list[torch.Tensor]
    routes: list[Recording]


def with_segments(packs: Sequence[Microbatch]) -> list[tuple[Microbatch, Segments]]:
    return [(pack, Segments.of_pack(pack.cu_seqlens, pack.response_mask_T)) for pack in packs]


def training_packs(model: Model, packs: Sequence[Microbatch], **found: Any) -> list[TrainingPack]:
    return with_each([training_pack(pack, model.groups) for pack in packs], **found)


def train_minibatch(
    model: Model,
    optimizer: Optimizer,
    packs: Sequence[Microbatch],
    old_log_probs: Sequence[torch.Tensor],
    algorithm: AlgorithmConfig,
    num_sequences: int,
    temperature: float,
    recorder: RouteRecorder | None,
    *,
    num_tokens: int | None = None,
    max_response_tokens: int = 0,
    reference_log_probs: Sequence[torch.Tensor] = (),
    old_routes: Sequence[Recording] = (),
    estimates: Sequence[Estimates] = (),
    replayed: Sequence[torch.Tensor | Replayed] | None = None,
) -> Result:
    """num_tokens: the mini-batch's, or those of these packs."""
    whole = training_packs(
        model,
        packs,
        old_log_probs_T=old_log_probs,
        reference_log_probs_T=reference_log_probs,
        recording=old_routes,
        estimates=estimates,
        **_replay(replayed or ()),
    )
    if num_tokens is None:
        num_tokens = int(sum(pack.response_mask_T.sum() for pack in packs))
    minibatch = Minibatch(tuple(whole), num_sequences, num_tokens)
    settings = step.PolicySettings(algorithm, temperature, max_response_tokens)
    result = step.train_minibatch(model, optimizer, minibatch, settings, recorder)
    log_probs = [one.log_probs_T for one in result.packs if one.log_probs_T is not None]
    return Result(result.statistics, result.update, log_probs, recordings_of(result.packs))


def _replay(replayed: Sequence[torch.Tensor | Replayed]) -> dict[str, list[torch.Tensor]]:
    whole = [one if isinstance(one, Replayed) else Replayed(one) for one in replayed]
    return {
        "replay_TLK": [one.routes_TLK for one in whole],
        "gates_TLK": [one.gates_TLK for one in whole if one.gates_TLK is not None],
        "held_TL": [one.held_TL for one in whole if one.held_TL is not None],
    }


def train_supervised(
    model: Model, optimizer: Optimizer, packs: Sequence[Microbatch], num_tokens: int
) -> tuple[step.SupervisedStatistics, UpdateResult]:
    whole = tuple(training_packs(model, packs))
    result = step.train_supervised(model, optimizer, Minibatch(whole, len(whole), num_tokens))
    return result.statistics, result.update
