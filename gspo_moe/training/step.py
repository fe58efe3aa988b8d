"""One optimizer step on one mini-batch: forward, loss, backward through the pipeline schedule, update.

Shape letters: T tokens of a pack, X what the last stage gives of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gspo_moe.algorithms import PolicyStatistics, policy_loss
from gspo_moe.algorithms.loss import ObjectiveFunction
from gspo_moe.algorithms.ratios import Objective, Segments
from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.config.schema import SEQUENCE_LEVEL, AlgorithmConfig
from gspo_moe.kernels import sequence_reduce
from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording, run, token_log_probs
from gspo_moe.model.inputs import microbatch_input
from gspo_moe.parallel.reduce import from_last_stage, reduce_statistics
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.training.optimizer import Optimizer, UpdateResult
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class MinibatchResult:
    """statistics: over all ranks. log_probs [T] (last stage) and routes (when recorded): of this rank's packs."""

    statistics: PolicyStatistics
    update: UpdateResult
    log_probs: list[torch.Tensor]
    routes: list[torch.Tensor]


def train_minibatch(
    model: Model,
    optimizer: Optimizer,
    microbatches: Sequence[Microbatch],
    old_log_probs: Sequence[torch.Tensor],
    algorithm: AlgorithmConfig,
    num_sequences: int,
    temperature: float,
    recorder: RouteRecorder | None,
) -> MinibatchResult:
    """Takes one step on the mini-batch whose packs on this rank are `microbatches`.

    old_log_probs: [T] a pack, needed on the last stage only. num_sequences: of the mini-batch over all ranks.
    """
    clip_low, clip_high = algorithm.clips
    log_probs: list[torch.Tensor] = []

    def head(index: int, output_TX: torch.Tensor) -> tuple[torch.Tensor, PolicyStatistics]:
        pack = microbatches[index]
        log_probs_T = token_log_probs(model, output_TX, pack.target_ids_T, temperature).log_probs
        log_probs.append(log_probs_T.detach())
        result = policy_loss(
            algorithm.name,
            log_probs_T,
            old_log_probs[index],
            pack.advantages_N,
            pack.cu_seqlens,
            pack.response_mask_T,
            clip_low=clip_low,
            clip_high=clip_high,
            allow_wide_clip=algorithm.allow_wide_clip,
            num_sequences=num_sequences,
            objective=_fused_objective(pack) if algorithm.name in SEQUENCE_LEVEL else None,
        )
        return result.loss, result.sums

    statistics, update, routes = _step(model, optimizer, microbatches, head, recorder)
    return MinibatchResult(statistics, update, log_probs, routes)


def _fused_objective(pack: Microbatch) -> ObjectiveFunction:
    """J_i of gspo and gspo_token by one kernel. Algorithms and kernels do not know each other; here they meet."""

    def objective(
        log_ratio_T: torch.Tensor, advantages: torch.Tensor, segments: Segments, clip_low: float, clip_high: float
    ) -> Objective:
        found = sequence_reduce(
            log_ratio_T,
            torch.zeros_like(log_ratio_T),
            segments.response_T,
            pack.cu_seqlens,
            advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            scale=1.0,
        )
        return Objective(-found.loss, found.clipped_tokens)

    return objective


class SupervisedStatistics(Statistics):
    """Cross-entropy and greedy accuracy of any number of packs."""

    def to_metrics(self) -> dict[str, float]:
        tokens = self.sums["tokens"].item()
        return {
            "sft/loss": -self.sums["log_prob"].item() / tokens,
            "sft/token_accuracy": self.sums["correct"].item() / tokens,
        }


def train_supervised(
    model: Model, optimizer: Optimizer, microbatches: Sequence[Microbatch], num_tokens: float
) -> tuple[SupervisedStatistics, UpdateResult]:
    """One step on -1/num_tokens sum log p(target) over response tokens; num_tokens: of the batch over all ranks."""

    def head(index: int, output_TX: torch.Tensor) -> tuple[torch.Tensor, SupervisedStatistics]:
        pack = microbatches[index]
        found = token_log_probs(model, output_TX, pack.target_ids_T)
        log_probs_T = found.log_probs
        sums = {
            "tokens": pack.response_mask_T.double().sum(),
            "log_prob": (log_probs_T.detach().double() * pack.response_mask_T).sum(),
            "correct": (found.first_choice * pack.response_mask_T.double()).sum(),
        }
        return -(log_probs_T * pack.response_mask_T).sum() / num_tokens, SupervisedStatistics(sums, {})

    statistics, update, _ = _step(model, optimizer, microbatches, head, None)
    return statistics, update


def _step(
    model: Model, optimizer: Optimizer, microbatches: Sequence[Microbatch], head: Any, recorder: RouteRecorder | None
) -> tuple[Any, UpdateResult, list[torch.Tensor]]:
    # Data-parallel reduction averages gradients; the losses are already shares of the whole, so that is undone.
    data_ranks = model.groups.layout.data

    def scaled(index: int, output_TX: torch.Tensor) -> tuple[torch.Tensor, Any]:
        loss, kept = head(index, output_TX)
        return loss * data_ranks, kept

    optimizer.zero_grad()
    kept = run(
        model,
        [microbatch_input(pack) for pack in microbatches],
        scaled,
        backward=True,
        record=no_recording if recorder is None else recorder.scope,
        for_log_probs=True,
    )
    statistics = None
    if kept:
        statistics = kept[0]
        for other in kept[1:]:
            statistics = statistics.merge(other)
        statistics = reduce_statistics(statistics, model.groups.data).cpu()
    update = optimizer.update()
    return from_last_stage(statistics, model.groups), update, [] if recorder is None else recorder.take()
