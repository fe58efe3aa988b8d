"""One optimizer step on one mini-batch: forward, loss, backward through the pipeline schedule, update.

Shape letters: T tokens of a pack, C this context-parallel rank's tokens of it, X what the last stage gives of each
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gspo_moe.algorithms import (
    Algorithm,
    Correction,
    CorrectionStatistics,
    Counts,
    Extras,
    KLPenalty,
    LossInputs,
    Objective,
    PolicyStatistics,
    Segments,
    Settings,
    ValueOptions,
    correct,
    policy_loss,
)
from gspo_moe.algorithms.ratios import whole_sequences
from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.algorithms.value import ValueLoss, value_loss
from gspo_moe.config.algorithm import AlgorithmConfig, MismatchConfig
from gspo_moe.kernels import sequence_reduce
from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording, run, token_log_probs, token_values
from gspo_moe.model.inputs import microbatch_input
from gspo_moe.parallel.context import ContextSplit, sum_over
from gspo_moe.parallel.reduce import from_last_stage, reduce_statistics
from gspo_moe.routing.recorder import Recording, RouteRecorder
from gspo_moe.routing.replay import replay
from gspo_moe.training.critic import Estimates
from gspo_moe.training.optimizer import Optimizer, UpdateResult
from gspo_moe.training.shift import ShiftOf, router_shift
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class MinibatchResult:
    """statistics: over all ranks. log_probs [T] (last stage) and routes (when recorded): of this rank's packs."""

    statistics: PolicyStatistics
    update: UpdateResult
    log_probs: list[torch.Tensor]
    routes: list[Recording]


def train_minibatch(
    model: Model,
    optimizer: Optimizer,
    microbatches: Sequence[Microbatch],
    old_log_probs: Sequence[torch.Tensor],
    algorithm: AlgorithmConfig,
    num_sequences: int,
    temperature: float,
    recorder: RouteRecorder | None,
    *,
    num_tokens: int | None = None,
    max_response_tokens: int | None = None,
    reference_log_probs: Sequence[torch.Tensor] = (),
    old_routes: Sequence[Recording] = (),
    estimates: Sequence[Estimates] = (),
    replayed: Sequence[torch.Tensor] | None = None,
) -> MinibatchResult:
    """Takes one step on the mini-batch whose packs on this rank are `microbatches`.

    old_log_probs: [T] a pack, needed on the last stage only, as are reference_log_probs, which a KL penalty needs.
    num_sequences, num_tokens: sequences and response tokens of the mini-batch over all ranks; the tokens are needed for
    losses that average over them, and max_response_tokens for those that divide by it.
    old_routes: the old policy's, which the recorder compares with; a router shift needs them, with scores.
    estimates: of a value function, one a pack, needed on the last stage only.
    replayed: routes [T, L, K] a pack to be replayed, as `routing.replay` takes them.
    """
    assert num_tokens is not None or algorithm.spec.average != "token", "a pack's own count would depend on the split"
    shift_of: ShiftOf | None = None
    if algorithm.spec.router_shift:
        assert recorder is not None
        shift_of = router_shift(model, recorder, microbatches, old_routes, replayed)
    elif recorder is not None and old_routes:
        recorder.against([recording.routes_TLK for recording in old_routes])
    head = _PolicyHead(
        model,
        microbatches,
        algorithm,
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        estimates=estimates,
        shift_of=shift_of,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        max_response_tokens=max_response_tokens,
        temperature=temperature,
    )
    statistics, update, routes = _step(model, optimizer, microbatches, head, recorder, replayed)
    return MinibatchResult(statistics, update, head.log_probs, routes)


@dataclass(frozen=True)
class _PolicyHead:
    """The loss of a pack from what the last stage gives, arguments as in `train_minibatch`; keeps the log-probs."""

    model: Model
    microbatches: Sequence[Microbatch]
    algorithm: AlgorithmConfig
    old_log_probs: Sequence[torch.Tensor]
    reference_log_probs: Sequence[torch.Tensor]
    estimates: Sequence[Estimates]
    shift_of: ShiftOf | None
    num_sequences: int
    num_tokens: int | None
    max_response_tokens: int | None
    temperature: float
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, index: int, output_CX: torch.Tensor, split: ContextSplit
    ) -> tuple[torch.Tensor, PolicyStatistics]:
        pack, algorithm = self.microbatches[index], self.algorithm
        targets_C = split.local(pack.target_ids_T)
        log_probs_C = token_log_probs(self.model, output_CX, targets_C, self.temperature).log_probs
        self.log_probs.append(split.whole(log_probs_C.detach()))
        split_over_ranks = self.model.groups.layout.context > 1
        context_sum = sum_over(self.model.groups.context) if split_over_ranks else whole_sequences
        result = policy_loss(
            algorithm.spec if split_over_ranks else with_fused_objective(algorithm.spec, split.bounds),
            log_probs_C,
            split.local(self.old_log_probs[index]),
            split.local(self.estimates[index].advantages_T) if self.estimates else pack.advantages_N,
            Segments.of_pack(split.bounds, split.local(pack.response_mask_T), context_sum),
            Settings(algorithm.clip_low, algorithm.clip_high, algorithm.allow_wide_clip, algorithm.settings),
            Counts(self.num_sequences, self.num_tokens, self.max_response_tokens),
            Extras(
                router_shift=None if self.shift_of is None else split.local(self.shift_of(index)),
                correction=_local_correction(pack, self.old_log_probs[index], algorithm.mismatch, split),
                kl=self._kl(index, split),
            ),
        )
        if not self.estimates:
            return result.loss, result.sums
        assert self.num_tokens is not None
        values_C = token_values(self.model, output_CX, len(log_probs_C))
        value = _value_loss(values_C, self.estimates[index], pack, split, algorithm.settings, self.num_tokens)
        return result.loss + value.loss.float(), result.sums.with_values(value.sums)

    def _kl(self, index: int, split: ContextSplit) -> KLPenalty | None:
        if not self.reference_log_probs:
            return None
        kl = self.algorithm.kl
        return KLPenalty(split.local(self.reference_log_probs[index]), kl.coeff, kl.estimator)


def _value_loss(
    values_C: torch.Tensor,
    estimates: Estimates,
    pack: Microbatch,
    split: ContextSplit,
    options: ValueOptions,
    num_tokens: int,
) -> ValueLoss:
    """The second term of an algorithm with a value function, its coefficient in it."""
    found = value_loss(
        values_C,
        split.local(estimates.values_T),
        split.local(estimates.returns_T),
        split.local(pack.response_mask_T),
        value_clip=options.value_clip,
        num_tokens=num_tokens,
        means=estimates.means,
    )
    return found._replace(loss=options.value_coeff * found.loss)


def _local_correction(
    pack: Microbatch, old_log_probs: torch.Tensor, config: MismatchConfig, split: ContextSplit
) -> Correction | None:
    """The pack's weights on this context rank's tokens; None without a correction."""
    if config.correction == "none":
        return None
    correction, _ = correction_of(pack, old_log_probs, config)
    return replace(correction, weights=split.local(correction.weights)) if correction.level == "token" else correction


def correction_of(
    pack: Microbatch, log_probs: torch.Tensor, config: MismatchConfig
) -> tuple[Correction, CorrectionStatistics]:
    """The configured weights of a pack; log_probs: the trainer's [T] at the weights that the engine sampled with."""
    return correct(
        config.correction,
        config.level,
        config.bounds,
        log_probs,
        pack.rollout_log_probs_T,
        Segments.of_pack(pack.cu_seqlens, pack.response_mask_T),
    )


def with_fused_objective(spec: Algorithm, cu_seqlens: torch.Tensor) -> Algorithm:
    """The same with J_i by one kernel, where there is one. Algorithms and kernels do not know each other but here."""
    if spec.fused is None:
        return spec

    def objective(inputs: LossInputs) -> Objective:
        found = sequence_reduce(
            inputs.log_ratio_T,
            torch.zeros_like(inputs.log_ratio_T),
            inputs.segments.response_T,
            cu_seqlens,
            inputs.advantages_N if spec.fused == "sequence" else inputs.advantages_T,
            clip_low=inputs.clip_low,
            clip_high=inputs.clip_high,
            scale=1.0,
        )
        return Objective(-found.loss, found.clipped_tokens)

    return replace(spec, objective=objective)


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

    def head(index: int, output_CX: torch.Tensor, split: ContextSplit) -> tuple[torch.Tensor, SupervisedStatistics]:
        pack = microbatches[index]
        targets_C, mask_C = split.local(pack.target_ids_T), split.local(pack.response_mask_T)
        found = token_log_probs(model, output_CX, targets_C)
        log_probs_C = found.log_probs
        sums = {
            "tokens": mask_C.double().sum(),
            "log_prob": (log_probs_C.detach().double() * mask_C).sum(),
            "correct": (found.first_choice * mask_C.double()).sum(),
        }
        return -(log_probs_C * mask_C).sum() / num_tokens, SupervisedStatistics(sums, {})

    statistics, update, _ = _step(model, optimizer, microbatches, head, None)
    return statistics, update


def _step(
    model: Model,
    optimizer: Optimizer,
    microbatches: Sequence[Microbatch],
    head: Any,
    recorder: RouteRecorder | None,
    replayed: Sequence[torch.Tensor] | None = None,
) -> tuple[Any, UpdateResult, list[Recording]]:
    # Data-parallel reduction averages gradients; the losses are already shares of the whole, so that is undone. Over
    # context-parallel ranks it averages too, which megatron-core's schedules undo.
    data_ranks = model.groups.layout.data
    splits = [ContextSplit(pack.cu_seqlens, model.groups.context) for pack in microbatches]

    def scaled(index: int, output_CX: torch.Tensor) -> tuple[torch.Tensor, Any]:
        loss, kept = head(index, output_CX, splits[index])
        return loss * data_ranks, kept

    optimizer.zero_grad()
    inputs = [microbatch_input(*each) for each in zip(microbatches, splits, strict=True)]
    record = no_recording if recorder is None else recorder.scope
    with replay(model.chunks, model.groups, replayed, record) as scope:
        kept = run(model, inputs, scaled, backward=True, record=scope, for_log_probs=True)
    statistics = None
    if kept:
        statistics = kept[0]
        for other in kept[1:]:
            statistics = statistics.merge(other)
        statistics = reduce_statistics(statistics, model.groups.data_context).cpu()
    update = optimizer.update()
    return from_last_stage(statistics, model.groups), update, [] if recorder is None else recorder.take()
