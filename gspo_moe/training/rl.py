"""One RL step: rollouts, rewards, advantages, old log-probs, off-policy mini-batches, routing volatility.

Shape letters: T tokens of a pack, L this stage's MoE layers, A all MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gspo_moe.algorithms import CorrectionStatistics, MismatchStatistics, mismatch
from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.data.schedule import plan_microbatches, split_mini_batches
from gspo_moe.parallel.groups import Groups
from gspo_moe.parallel.reduce import from_last_stage, reduce_statistics
from gspo_moe.platform import device
from gspo_moe.rollout.answers import Answers
from gspo_moe.rollout.score import score
from gspo_moe.routing import LoadSums, RouteSums
from gspo_moe.training.collect import collect, rollouts
from gspo_moe.training.session import Trainer
from gspo_moe.training.step import MinibatchResult, correction_of, train_minibatch
from gspo_moe.types import Microbatch, TrainingSample


@dataclass(frozen=True)
class Minibatch:
    """This rank's packs of one mini-batch, and how many sequences and response tokens it has over all ranks."""

    packs: list[Microbatch]
    num_sequences: int
    num_tokens: int


@dataclass(frozen=True)
class StepResult:
    """metrics: over all ranks, for the log. answers and advantages: every rank's, in the order of the prompts."""

    metrics: dict[str, float]
    answers: Answers
    advantages: list[float]


def rl_step(trainer: Trainer) -> StepResult:
    """Takes one RL step and moves `trainer.progress` on. Collective."""
    timers = trainer.session.timers
    with timers("step"):
        collected = collect(trainer)
        answers, advantages, figures = collected.answers, collected.advantages, dict(collected.metrics)
        minibatches = _minibatches(trainer, answers, advantages)
        with timers("old_log_probs"):
            old_log_probs, old_routes = _old_policy(trainer, minibatches)
        reference_log_probs = _reference_policy(trainer, minibatches)
        with timers("training"):
            results = _train(trainer, minibatches, old_log_probs, reference_log_probs)
        figures |= _policy_metrics(results)
        figures |= _routing_metrics(trainer, minibatches, old_routes, results)
        figures |= _load_metrics(trainer, results)
        if trainer.session.config.algorithm.old_log_probs == "trainer":
            figures |= _mismatch_metrics(trainer, minibatches, old_log_probs)
            figures |= _correction_metrics(trainer, minibatches, old_log_probs)
        else:  # only the first mini-batch's own forward has seen the rollout's weights
            figures |= _mismatch_metrics(trainer, minibatches[:1], [results[0].log_probs])
    progress = trainer.progress
    trainer.progress = replace(
        progress,
        step=progress.step + 1,
        prompt_position=collected.prompt_position,
        policy_version=progress.policy_version + len(minibatches),
    )
    return StepResult(figures | {"policy_version": trainer.progress.policy_version}, answers, advantages)


def _minibatches(trainer: Trainer, answers: Answers, advantages: Sequence[float]) -> list[Minibatch]:
    config, groups = trainer.session.config, trainer.session.groups
    samples = [
        TrainingSample(
            token_ids=rollout.prompt_ids + rollout.response_ids,
            response_mask=(0,) * len(rollout.prompt_ids) + (1,) * len(rollout.response_ids),
            advantage=advantage,
            rollout_log_probs=rollout.log_probs,
        )
        for rollout, advantage in zip(rollouts(answers), advantages, strict=True)
    ]
    minibatches = []
    for indices in split_mini_batches(
        len(answers.groups), config.rollout.samples_per_prompt, config.algorithm.mini_batches
    ):
        chosen = [samples[i] for i in indices]
        num_tokens = sum(sum(sample.response_mask[1:]) for sample in chosen)
        minibatches.append(Minibatch(pack_share(chosen, groups, config), len(chosen), num_tokens))
    return minibatches


def pack_share(samples: Sequence[TrainingSample], groups: Groups, config: Config) -> list[Microbatch]:
    """This rank's packs of a batch that all ranks know, on this process's device."""
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    layout = groups.layout
    plan = plan_microbatches(
        lengths,
        layout.data,
        config.schedule.micro_batch_tokens,
        multiple_of=layout.pipeline if layout.virtual_pipeline else 1,
    )
    return [pack(samples, indices).to(device().torch_device) for indices in plan[groups.data_rank]]


def _old_policy(
    trainer: Trainer, minibatches: Sequence[Minibatch]
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Old log-probs and routes of each mini-batch's packs; log-probs only on the last stage."""
    config, model, recorder = trainer.session.config, trainer.session.model, trainer.recorder
    packs = [pack for minibatch in minibatches for pack in minibatch.packs]
    if config.algorithm.old_log_probs == "rollout":
        return _by_minibatch([pack.rollout_log_probs_T for pack in packs], minibatches), []
    log_probs = score(model, packs, temperature=config.rollout.temperature, recorder=recorder)
    routes = [] if recorder is None else recorder.take()
    return _by_minibatch(log_probs, minibatches), _by_minibatch(routes, minibatches)


def _reference_policy(trainer: Trainer, minibatches: Sequence[Minibatch]) -> list[list[torch.Tensor]]:
    """The reference's log-probs of each mini-batch's packs; none without a reference, only on the last stage."""
    if trainer.reference is None:
        return [[] for _ in minibatches]
    packs = [pack for minibatch in minibatches for pack in minibatch.packs]
    with trainer.session.timers("reference"):
        log_probs = score(trainer.reference, packs, temperature=trainer.session.config.rollout.temperature)
    return _by_minibatch(log_probs, minibatches)


def _by_minibatch(values: Sequence[torch.Tensor], minibatches: Sequence[Minibatch]) -> list[list[torch.Tensor]]:
    """Cuts one list over all packs back into mini-batches; an empty list gives empty ones."""
    rest = iter(values)
    return [[next(rest) for _ in minibatch.packs] if values else [] for minibatch in minibatches]


def _train(
    trainer: Trainer,
    minibatches: Sequence[Minibatch],
    old_log_probs: list[list[torch.Tensor]],
    reference_log_probs: list[list[torch.Tensor]],
) -> list[MinibatchResult]:
    config = trainer.session.config
    return [
        train_minibatch(
            trainer.session.model,
            trainer.optimizer,
            minibatch.packs,
            old,
            config.algorithm,
            minibatch.num_sequences,
            config.rollout.temperature,
            trainer.recorder,
            num_tokens=minibatch.num_tokens,
            max_response_tokens=config.rollout.max_response_tokens,
            reference_log_probs=reference,
        )
        for minibatch, old, reference in zip(minibatches, old_log_probs, reference_log_probs, strict=True)
    ]


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


def _routing_metrics(
    trainer: Trainer,
    minibatches: Sequence[Minibatch],
    old_routes: list[list[torch.Tensor]],
    results: Sequence[MinibatchResult],
) -> dict[str, float]:
    """Staleness of SPEC section 4: the routes of each mini-batch's training forward against the old policy's."""
    recorder = trainer.recorder
    if recorder is None or not old_routes:
        return {}
    topk = trainer.session.plan.architecture.num_experts_per_tok
    metrics: dict[str, float] = {}
    total: RouteSums | None = None
    for number, (minibatch, old, result) in enumerate(zip(minibatches, old_routes, results, strict=True), start=1):
        overlaps = [
            recorder.overlap(o, n)[pack.route_mask_T]
            for pack, o, n in zip(minibatch.packs, old, result.routes, strict=True)
        ]
        sums = reduce_statistics(RouteSums.from_overlap(torch.cat(overlaps), topk), trainer.session.groups.data)
        metrics |= staleness_metrics(sums, f"/mini_batch_{number}")
        total = sums if total is None else total.merge(sums)
    assert total is not None
    return metrics | staleness_metrics(total, "", layers=True)


def staleness_metrics(sums: RouteSums, suffix: str, layers: bool = False) -> dict[str, float]:
    """Route changes under their logged names; `layers` adds the per-layer figures."""
    named: dict[str, float] = {}
    for name, value in sums.to_metrics().items():
        if isinstance(value, list):
            if layers:
                base = name.removesuffix("_by_layer")
                named |= {f"routing/staleness/{base}/layer_{i:02d}": v for i, v in enumerate(value)}
        else:
            named[f"routing/staleness/{name}{suffix}"] = value
    return named


def _load_metrics(trainer: Trainer, results: Sequence[MinibatchResult]) -> dict[str, float]:
    """Expert load of SPEC section 4 over all tokens of the step's training forwards."""
    if trainer.recorder is None:
        return {}
    load_AE = trainer.recorder.load([routes for result in results for routes in result.routes])
    return reduce_statistics(LoadSums.from_load(load_AE), trainer.session.groups.data).to_metrics()


def _mismatch_metrics(
    trainer: Trainer, minibatches: Sequence[Minibatch], log_probs: list[list[torch.Tensor]]
) -> dict[str, float]:
    """Rollout engine against trainer at equal weights, SPEC section 3."""
    statistics: MismatchStatistics | None = None
    for minibatch, scored in zip(minibatches, log_probs, strict=True):
        for one, log_probs_T in zip(minibatch.packs, scored, strict=False):
            found = mismatch(log_probs_T, one.rollout_log_probs_T, one.cu_seqlens, one.response_mask_T)
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
