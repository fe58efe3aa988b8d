"""One RL step: rollouts, rewards, advantages, old log-probs, off-policy mini-batches, routing volatility.

Shape letters: T tokens of a pack, L this stage's MoE layers, A all MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from gspo_moe.algorithms import CorrectionStatistics, MismatchStatistics, Segments, mismatch
from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.data.schedule import plan_microbatches, split_mini_batches
from gspo_moe.errors import DataError, TrainingError
from gspo_moe.parallel.groups import Groups
from gspo_moe.parallel.reduce import from_last_stage, reduce_statistics
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.platform import device
from gspo_moe.rollout.answers import Answers
from gspo_moe.rollout.score import score, score_with_values
from gspo_moe.routing.recorder import Recording
from gspo_moe.routing.replay import check_routes
from gspo_moe.training.attribution import attribution_figures
from gspo_moe.training.collect import collect, rollouts
from gspo_moe.training.critic import Estimates, estimate, value_fault
from gspo_moe.training.probe import probe_set
from gspo_moe.training.routing import (
    Figures,
    Probe,
    compare_packs,
    engine_figures,
    engine_routes,
    load_figures,
    staleness,
)
from gspo_moe.training.session import Trainer
from gspo_moe.training.step import MinibatchResult, correction_of, train_minibatch
from gspo_moe.types import Microbatch, TrainingSample

T = TypeVar("T")


@dataclass(frozen=True)
class Minibatch:
    """This rank's packs of one mini-batch, and how many sequences and response tokens it has over all ranks."""

    packs: list[Microbatch]
    num_sequences: int
    num_tokens: int


@dataclass(frozen=True)
class OldPolicy:
    """What the pass before the first update found of each mini-batch's packs.

    log_probs [T] and estimates of a value function: on the last stage. routes: no mini-batches where
    they were not recorded.
    """

    log_probs: list[list[torch.Tensor]]
    routes: list[list[Recording]]
    estimates: list[list[Estimates]]


@dataclass(frozen=True)
class StepResult:
    """metrics: over all ranks, for the log. answers and advantages: every rank's, in the order of the prompts.

    layers: figures by layer, over all ranks, for their own file.
    """

    metrics: dict[str, float]
    answers: Answers
    advantages: list[float]
    layers: dict[str, np.ndarray]


def rl_step(trainer: Trainer) -> StepResult:
    """Takes one RL step and moves `trainer.progress` on. Collective."""
    timers = trainer.session.timers
    with timers("step"):
        collected = collect(trainer)
        answers, advantages, figures = collected.answers, collected.advantages, dict(collected.metrics)
        samples = _samples(trainer, answers, advantages)
        minibatches = _minibatches(trainer, samples)
        with timers("old_log_probs"):
            old = _old_policy(trainer, minibatches)
        reference_log_probs = _reference_policy(trainer, minibatches)
        with timers("training"):
            results, routing = _train(trainer, minibatches, old, reference_log_probs, samples)
        figures |= _policy_metrics(results)
        current = all(rollout.policy_version == trainer.progress.policy_version for rollout in rollouts(answers))
        routing.add(_routing_figures(trainer, minibatches, old.routes, results, current))
        figures |= routing.metrics
        if trainer.session.config.algorithm.old_log_probs == "trainer":
            figures |= _mismatch_metrics(trainer, minibatches, old.log_probs)
            figures |= _correction_metrics(trainer, minibatches, old.log_probs)
        else:  # only the first mini-batch's own forward has seen the rollout's weights
            figures |= _mismatch_metrics(trainer, minibatches[:1], [results[0].log_probs])
    progress = trainer.progress
    trainer.progress = replace(
        progress,
        step=progress.step + 1,
        prompt_position=collected.prompt_position,
        policy_version=progress.policy_version + len(minibatches),
    )
    metrics = figures | {"policy_version": trainer.progress.policy_version}
    return StepResult(metrics, answers, advantages, routing.layers)


def _samples(trainer: Trainer, answers: Answers, advantages: Sequence[float]) -> list[TrainingSample]:
    samples = [
        TrainingSample(
            token_ids=rollout.prompt_ids + rollout.response_ids,
            response_mask=(0,) * len(rollout.prompt_ids) + (1,) * len(rollout.response_ids),
            advantage=advantage,
            rollout_log_probs=rollout.log_probs,
            routes=rollout.routes,
        )
        for rollout, advantage in zip(rollouts(answers), advantages, strict=True)
    ]
    if trainer.session.config.routing.reports_engine_routes:
        check_routes(samples, trainer.session.plan.architecture)
    return samples


def _minibatches(trainer: Trainer, samples: Sequence[TrainingSample]) -> list[Minibatch]:
    config, groups = trainer.session.config, trainer.session.groups
    size = config.rollout.samples_per_prompt
    minibatches = []
    for indices in split_mini_batches(len(samples) // size, size, config.algorithm.mini_batches):
        chosen = [samples[i] for i in indices]
        num_tokens = sum(sum(sample.response_mask[1:]) for sample in chosen)
        minibatches.append(Minibatch(pack_share(chosen, groups, config), len(chosen), num_tokens))
    return minibatches


def pack_share(samples: Sequence[TrainingSample], groups: Groups, config: Config) -> list[Microbatch]:
    """This rank's packs of a batch that all ranks know, on this process's device.

    Raises TrainingError, on every rank, where no plan of micro-batches holds it.
    """
    lengths, layout = [len(sample.token_ids) - 1 for sample in samples], groups.layout
    multiple_of = layout.pipeline if layout.virtual_pipeline else 1
    try:
        plan = plan_microbatches(lengths, layout.data, config.schedule.micro_batch_tokens, multiple_of=multiple_of)
    except DataError as error:
        raise TrainingError(str(error)) from error
    return [pack(samples, indices).to(device().torch_device) for indices in plan[groups.data_rank]]


def _old_policy(trainer: Trainer, minibatches: Sequence[Minibatch]) -> OldPolicy:
    config, model, recorder = trainer.session.config, trainer.session.model, trainer.recorder
    packs = [pack for minibatch in minibatches for pack in minibatch.packs]
    nothing: list[list[Estimates]] = [[] for _ in minibatches]
    if config.algorithm.old_log_probs == "rollout":
        return OldPolicy(_by_minibatch([pack.rollout_log_probs_T for pack in packs], minibatches), [], nothing)
    # R3's ratios compare like with like only where the old policy runs with the engine's routes as well.
    replayed = engine_routes(model, packs) if config.routing.replay == "r3" else None
    temperature, values = config.rollout.temperature, list[torch.Tensor]()
    if config.has_value_head:
        found = score_with_values(model, packs, temperature=temperature, recorder=recorder, routes=replayed)
        log_probs, values = [one for one, _ in found], [one for _, one in found]
    else:
        log_probs = score(model, packs, temperature=temperature, recorder=recorder, routes=replayed)
    routes = [] if recorder is None else recorder.take()
    estimates: list[Estimates] = []
    if config.has_value_head:
        estimates = estimate(packs, values, config.algorithm.settings, model.groups)
        raise_everywhere(value_fault(estimates))
    return OldPolicy(
        _by_minibatch(log_probs, minibatches),
        _by_minibatch(routes, minibatches),
        _by_minibatch(estimates, minibatches),
    )


def _reference_policy(trainer: Trainer, minibatches: Sequence[Minibatch]) -> list[list[torch.Tensor]]:
    """The reference's log-probs of each mini-batch's packs; none without a reference, only on the last stage."""
    if trainer.reference is None:
        return [[] for _ in minibatches]
    packs = [pack for minibatch in minibatches for pack in minibatch.packs]
    with trainer.session.timers("reference"):
        log_probs = score(trainer.reference, packs, temperature=trainer.session.config.rollout.temperature)
    return _by_minibatch(log_probs, minibatches)


def _by_minibatch(values: Sequence[T], minibatches: Sequence[Minibatch]) -> list[list[T]]:
    """Cuts one list over all packs back into mini-batches; an empty list gives empty ones."""
    rest = iter(values)
    return [[next(rest) for _ in minibatch.packs] if values else [] for minibatch in minibatches]


def _train(
    trainer: Trainer,
    minibatches: Sequence[Minibatch],
    old: OldPolicy,
    reference_log_probs: list[list[torch.Tensor]],
    samples: Sequence[TrainingSample],
) -> tuple[list[MinibatchResult], Figures]:
    """Every mini-batch's step, and what is measured between them."""
    session, recorder, step = trainer.session, trainer.recorder, trainer.progress.step + 1
    config, model = session.config, session.model
    results, figures = [], Figures()
    for number, (minibatch, log_probs) in enumerate(zip(minibatches, old.log_probs, strict=True), start=1):
        recorded = old.routes[number - 1] if old.routes else []
        own = [recording.routes_TLK for recording in recorded] if recorded else None
        replayed = {"none": None, "r2": own, "r3": None}[config.routing.replay]
        if config.routing.replay == "r3":
            replayed = engine_routes(model, minibatch.packs)
        probe = None
        if number == 1 and recorder is not None and _due(config.routing.probe_interval, step):
            with session.timers("routing"):
                probe = Probe(model, recorder, _probe_packs(trainer, samples))
        if (
            number == len(minibatches)
            and config.routing.attribution
            and _due(config.routing.attribution_interval, step)
        ):
            held = own if replayed is None else replayed
            assert held is not None
            with session.timers("routing"):
                figures.add(attribution_figures(model, config, minibatch.packs, log_probs, held, config.seed + step))
        results.append(
            train_minibatch(
                model,
                trainer.optimizer,
                minibatch.packs,
                log_probs,
                config.algorithm,
                minibatch.num_sequences,
                config.rollout.temperature,
                recorder,
                num_tokens=minibatch.num_tokens,
                max_response_tokens=config.rollout.max_response_tokens,
                reference_log_probs=reference_log_probs[number - 1],
                old_routes=recorded,
                estimates=old.estimates[number - 1],
                replayed=replayed,
            )
        )
        if probe is not None:
            with session.timers("routing"):
                figures.add(probe.figures())
    return results, figures


def _due(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0


def _probe_packs(trainer: Trainer, samples: Sequence[TrainingSample]) -> list[Microbatch]:
    session = trainer.session
    if trainer.probe_packs is None:
        chosen = probe_set(
            session.run_path,
            samples,
            session.config.rollout.samples_per_prompt,
            session.config.routing.probe_sequences,
            resumed=trainer.progress.step > 0,
            main=session.groups.is_main,
        )
        trainer.probe_packs = pack_share(chosen, session.groups, session.config)
    return trainer.probe_packs


def _policy_metrics(results: Sequence[MinibatchResult]) -> dict[str, float]:
    statistics = results[0].statistics
    for result in results[1:]:
        statistics = statistics.merge(result.statistics)
    return {
        **statistics.to_metrics(),
        "optimizer/grad_norm": sum(result.update.grad_norm for result in results) / len(results),
        "optimizer/learning_rate": results[-1].update.learning_rate,
        "optimizer/skipped_updates": sum(result.update.skipped for result in results),
    }


def _routing_figures(
    trainer: Trainer,
    minibatches: Sequence[Minibatch],
    old_routes: list[list[Recording]],
    results: Sequence[MinibatchResult],
    equal_weights: bool,
) -> Figures:
    """The pairs that cost no forward pass, and the load of the training forwards.

    equal_weights: the rollouts were sampled from the weights that the step began with.
    """
    recorder, model, groups = trainer.recorder, trainer.session.model, trainer.session.groups
    if recorder is None:
        return Figures()
    figures = load_figures(recorder, groups, [recording for result in results for recording in result.routes])
    if old_routes:
        sums = [
            compare_packs(recorder, groups, minibatch.packs, old, result.routes)
            for minibatch, old, result in zip(minibatches, old_routes, results, strict=True)
        ]
        figures.add(staleness(sums))
        if trainer.session.config.routing.reports_engine_routes:
            packs = [pack for minibatch in minibatches for pack in minibatch.packs]
            trained = [each for old in old_routes for each in old]
            figures.add(engine_figures(model, recorder, packs, trained, equal_weights))
    return figures


def _mismatch_metrics(
    trainer: Trainer, minibatches: Sequence[Minibatch], log_probs: list[list[torch.Tensor]]
) -> dict[str, float]:
    """Rollout engine against trainer at equal weights, SPEC section 3."""
    statistics: MismatchStatistics | None = None
    for minibatch, scored in zip(minibatches, log_probs, strict=True):
        for one, log_probs_T in zip(minibatch.packs, scored, strict=False):
            segments = Segments.of_pack(one.cu_seqlens, one.response_mask_T)
            found = mismatch(log_probs_T, one.rollout_log_probs_T, segments)
            statistics = found if statistics is None else statistics.merge(found)
    if statistics is not None:
        statistics = reduce_statistics(statistics, trainer.session.groups.data).cpu()
    reduced: MismatchStatistics = from_last_stage(statistics, trainer.session.groups)
    return reduced.to_metrics()


def _correction_metrics(
    trainer: Trainer, minibatches: Sequence[Minibatch], log_probs: list[list[torch.Tensor]]
) -> dict[str, float]:
    """The weights that training puts on tokens or sequences against that mismatch."""
    algorithm, groups = trainer.session.config.algorithm, trainer.session.groups
    if algorithm.mismatch.correction == "none":
        return {}
    statistics: CorrectionStatistics | None = None
    for minibatch, scored in zip(minibatches, log_probs, strict=True):
        for one, log_probs_T in zip(minibatch.packs, scored, strict=False):
            _, found = correction_of(one, log_probs_T, algorithm.mismatch)
            statistics = found if statistics is None else statistics.merge(found)
    if statistics is not None:
        statistics = reduce_statistics(statistics, groups.data).cpu()
    reduced: CorrectionStatistics = from_last_stage(statistics, groups)
    return reduced.to_metrics()
