"""One optimizer step on one mini-batch: forward, loss, backward through the pipeline schedule, update.

Shape letters: T tokens of a pack, C this context-parallel rank's tokens of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from gspo_moe.algorithms import Correction, CorrectionStatistics, KLPenalty, PolicyStatistics, correct, policy_loss
from gspo_moe.algorithms.loss import Counts, Extras, Settings
from gspo_moe.algorithms.off_policy_mask import OffPolicyMask
from gspo_moe.algorithms.ratios import LossInputs, Objective
from gspo_moe.algorithms.spec import Algorithm, ValueOptions
from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.algorithms.value import ValueLoss, value_loss
from gspo_moe.config.algorithm import AlgorithmConfig, MismatchConfig
from gspo_moe.kernels import sequence_reduce
from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording, run
from gspo_moe.model.inputs import microbatch_input, response_positions
from gspo_moe.model.last_stage import LastStage
from gspo_moe.parallel.reduce import from_last_stage, reduce_statistics
from gspo_moe.routing.prediction import Lesson, PredictedPass
from gspo_moe.routing.recorder import RoutePass, RouteRecorder, Watching
from gspo_moe.routing.replay import Ledger, replay
from gspo_moe.training.optimizer import Optimizer, UpdateResult
from gspo_moe.training.packs import Minibatch, Trained, TrainingPack, recordings_of, replay_of, with_each
from gspo_moe.training.predictor import Predictor
from gspo_moe.training.shift import ShiftOf, router_shift

S = TypeVar("S", bound=Statistics)
K = TypeVar("K")
# A pack's number, what the last stage gives of it and where its response tokens are here, to its loss and what is kept
# of it, statistics first.
Head = Callable[[int, LastStage, torch.Tensor], tuple[torch.Tensor, tuple[S, K]]]


@dataclass(frozen=True)
class PolicySettings:
    """What the loss of every mini-batch is made with."""

    algorithm: AlgorithmConfig
    temperature: float
    max_response_tokens: int


@dataclass(frozen=True)
class MinibatchResult:
    """statistics: over all ranks. packs: this rank's. ledger: what its routers replayed."""

    statistics: PolicyStatistics
    update: UpdateResult
    packs: list[Trained]
    ledger: Ledger


def train_minibatch(
    model: Model,
    optimizer: Optimizer,
    minibatch: Minibatch,
    settings: PolicySettings,
    recorder: RouteRecorder | None,
) -> MinibatchResult:
    """Takes one step on a mini-batch. Collective.

    Its packs have old log-probs on the last stage, or none where the weights are still the old policy's, and whatever
    else the algorithm needs: recordings with scores for a router shift, estimates for a value function, reference
    log-probs for a KL penalty.
    """
    packs = minibatch.packs
    record = None if recorder is None else recorder.start([one.routes_TLK for one in recordings_of(packs)] or None)
    shift_of: ShiftOf | None = None
    if settings.algorithm.spec.router_shift:
        assert recorder is not None
        assert record is not None
        shift_of = router_shift(model, recorder, packs, record)
    lesson, check = _prediction(optimizer.predictor, packs, record)
    head, ledger = partial(policy_head, minibatch, settings, shift_of), Ledger()
    statistics, log_probs, update = _step(model, optimizer, packs, head, check or lesson or record, ledger)
    recordings = [] if record is None else record.recordings()
    foretold = [] if check is None else [one.routes_TLK for one in check.foretold()]
    trained = [Trained(one) for one in packs]
    trained = with_each(trained, log_probs_T=log_probs, recording=recordings, foretold_TLK=foretold)
    return MinibatchResult(statistics, update, trained, ledger)


def _prediction(
    predictor: Predictor | None, packs: Sequence[TrainingPack], record: RoutePass | None
) -> tuple[Lesson | None, PredictedPass | None]:
    """What listens in for the predictors' sake: at the old policy's weights there is nothing to learn, but to check.

    Neither where nothing was foretold, as in a mini-batch of a dump.
    """
    foretold = [(one.foretold, one.pack.route_mask_T) for one in packs if one.foretold is not None]
    if predictor is None or not foretold:
        return None, None
    if packs[0].minibatch == 0:
        return None, predictor.start(record, forced=False)
    return predictor.lesson(foretold, record), None


def policy_head(
    minibatch: Minibatch,
    settings: PolicySettings,
    shift_of: ShiftOf | None,
    index: int,
    stage: LastStage,
    positions_N: torch.Tensor,
) -> tuple[torch.Tensor, tuple[PolicyStatistics, torch.Tensor]]:
    """The loss of a pack, and its log-probs [T], 0 off the response."""
    one, algorithm = minibatch.packs[index], settings.algorithm
    pack, split = one.pack, one.split
    targets_C = split.local(pack.target_ids_T)
    found = stage.log_probs(targets_C, settings.temperature, entropy=True, positions_N=positions_N)
    kept = split.whole(found.log_probs.detach())
    old_log_probs_T = kept if one.old_log_probs_T is None else one.old_log_probs_T
    result = policy_loss(
        _fused(algorithm.spec, split.bounds) if split.size == 1 and algorithm.dual_clip is None else algorithm.spec,
        found.log_probs,
        split.local(old_log_probs_T),
        pack.advantages_N if one.estimates is None else split.local(one.estimates.advantages_T),
        one.local_segments,
        _settings(algorithm),
        Counts(minibatch.num_sequences, minibatch.num_tokens, settings.max_response_tokens),
        Extras(
            router_shift=None if shift_of is None else split.local(shift_of(index)),
            correction=_local_correction(one, old_log_probs_T, algorithm.mismatch),
            off_policy_mask=_off_policy_mask(one, algorithm),
            kl=_kl_penalty(one, algorithm),
            entropy=found.entropy,
        ),
    )
    if one.estimates is None:
        return result.loss, (result.sums, kept)
    value = _value_loss(stage.values(), one, algorithm.settings, minibatch.num_tokens)
    return result.loss + value.loss.float(), (result.sums.with_values(value.sums), kept)


def _settings(algorithm: AlgorithmConfig) -> Settings:
    low, high = algorithm.clip_low, algorithm.clip_high
    return Settings(low, high, algorithm.allow_wide_clip, algorithm.settings, algorithm.dual_clip)


def _off_policy_mask(one: TrainingPack, algorithm: AlgorithmConfig) -> OffPolicyMask | None:
    if algorithm.off_policy_mask is None:
        return None
    return OffPolicyMask(one.split.local(one.pack.rollout_log_probs_T), algorithm.off_policy_mask)


def _kl_penalty(one: TrainingPack, algorithm: AlgorithmConfig) -> KLPenalty | None:
    if one.reference_log_probs_T is None:
        return None
    return KLPenalty(one.split.local(one.reference_log_probs_T), algorithm.kl.coeff, algorithm.kl.estimator)


def _value_loss(values_C: torch.Tensor, one: TrainingPack, options: ValueOptions, num_tokens: int) -> ValueLoss:
    """The value function's term, its coefficient in it."""
    assert one.estimates is not None
    found = value_loss(
        values_C,
        one.split.local(one.estimates.values_T),
        one.split.local(one.estimates.returns_T),
        one.split.local(one.pack.response_mask_T),
        value_clip=options.value_clip,
        num_tokens=num_tokens,
        means=one.estimates.means,
    )
    return found._replace(loss=options.value_coeff * found.loss)


def _local_correction(one: TrainingPack, old_log_probs_T: torch.Tensor, config: MismatchConfig) -> Correction | None:
    """The pack's weights on this context rank's tokens; None without a correction."""
    if config.correction == "none":
        return None
    found, _ = correction_of(one, old_log_probs_T, config)
    return replace(found, weights=one.split.local(found.weights)) if found.level == "token" else found


def correction_of(
    one: TrainingPack, log_probs_T: torch.Tensor, config: MismatchConfig
) -> tuple[Correction, CorrectionStatistics]:
    """The configured weights of a pack; log_probs_T: the trainer's at the weights that the engine sampled with."""
    how = config.correction, config.level, config.bounds
    return correct(*how, log_probs_T, one.pack.rollout_log_probs_T, one.segments)


def _fused(spec: Algorithm, cu_seqlens: torch.Tensor) -> Algorithm:
    """The same, by one kernel where there is one. Algorithms and kernels do not know each other; here they meet."""
    if spec.fused is None:
        return spec

    def objective(inputs: LossInputs) -> Objective:
        found = sequence_reduce(
            inputs.log_ratio_T,
            torch.zeros_like(inputs.log_ratio_T),
            inputs.segments.response_T,
            cu_seqlens,
            inputs.advantages_N if spec.fused == "sequence" else inputs.advantages_T,
            clips=(inputs.clip_low, inputs.clip_high),
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


@dataclass(frozen=True)
class SupervisedResult:
    """As `MinibatchResult`."""

    statistics: SupervisedStatistics
    update: UpdateResult
    packs: list[Trained]


def train_supervised(model: Model, optimizer: Optimizer, minibatch: Minibatch) -> SupervisedResult:
    """One step on -1/num_tokens sum log p(target) over response tokens. Collective."""
    packs = minibatch.packs

    def head(
        index: int, stage: LastStage, positions_N: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[SupervisedStatistics, torch.Tensor]]:
        pack, split = packs[index].pack, packs[index].split
        mask_C = split.local(pack.response_mask_T)
        found = stage.log_probs(split.local(pack.target_ids_T), positions_N=positions_N)
        sums = {
            "tokens": mask_C.double().sum(),
            "log_prob": (found.log_probs.detach().double() * mask_C).sum(),
            "correct": (found.first_choice * mask_C.double()).sum(),
        }
        kept = split.whole(found.log_probs.detach())
        return -(found.log_probs * mask_C).sum() / minibatch.num_tokens, (SupervisedStatistics(sums, {}), kept)

    statistics, log_probs, update = _step(model, optimizer, packs, head, None)
    return SupervisedResult(statistics, update, with_each([Trained(one) for one in packs], log_probs_T=log_probs))


def _step(
    model: Model,
    optimizer: Optimizer,
    packs: Sequence[TrainingPack],
    head: Head[S, K],
    watch: Watching | None,
    ledger: Ledger | None = None,
) -> tuple[S, list[K], UpdateResult]:
    """Statistics over all ranks, what was kept of each pack on the last stage, and the update."""
    # Data-parallel reduction averages gradients; the losses are already shares of the whole, so that is undone. Over
    # context-parallel ranks it averages too, which megatron-core's schedules undo.
    data_ranks = model.groups.layout.data

    def scaled(index: int, stage: LastStage) -> tuple[torch.Tensor, tuple[S, K]]:
        loss, kept = head(index, stage, positions[index])
        return loss * data_ranks, kept

    optimizer.zero_grad()
    inputs = [microbatch_input(one.pack, one.split) for one in packs]
    # Before the pass: in the midst of it the host would wait for all of the pack's forward.
    positions = [response_positions(one.pack, one.split) for one in packs]
    recording = no_recording if watch is None else watch.scope
    with replay(model.chunks, model.groups, replay_of(packs), recording, ledger=ledger) as scope:
        kept = run(model, inputs, scaled, backward=True, record=scope)
    statistics = None
    if kept:
        statistics = kept[0][0]
        for other, _ in kept[1:]:
            statistics = statistics.merge(other)
        statistics = reduce_statistics(statistics, model.groups.data_context).cpu()
    statistics = from_last_stage(statistics, model.groups)
    lesson = watch if isinstance(watch, Lesson) else None
    update = optimizer.update(finite=statistics.is_finite(), lesson=lesson)
    return statistics, [each for _, each in kept], update
