"""Learning from a batch, wherever it came from: old policy, mini-batches, and what is measured around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import TypeVar

from gspo_moe.algorithms import Statistics, mismatch
from gspo_moe.algorithms.lag import mismatch_by_lag
from gspo_moe.data.probe import probe_set
from gspo_moe.parallel.reduce import from_last_stage, reduce_statistics
from gspo_moe.parallel.stop import together
from gspo_moe.routing.figures import Figures
from gspo_moe.training.attribution import attribution_figures
from gspo_moe.training.batch import Batch, share_packs
from gspo_moe.training.dump import dump_skipped
from gspo_moe.training.lag import Lags
from gspo_moe.training.old_policy import first_scored, with_old_policy, with_own_forward
from gspo_moe.training.packs import Minibatch, TrainingPack, pack_share
from gspo_moe.training.replay_audit import replay_figures
from gspo_moe.training.routing import Probe, routing_figures
from gspo_moe.training.session import Trainer
from gspo_moe.training.step import MinibatchResult, PolicySettings, correction_of, train_minibatch

S = TypeVar("S", bound=Statistics)


def learn(trainer: Trainer, batch: Batch) -> Figures:
    """Takes the steps on a batch's `algorithm.mini_batches`; figures over all ranks. Collective."""
    shared = share_packs(trainer, batch)
    minibatches = replace(shared, packs=with_old_policy(trainer, shared.packs)).minibatches()
    figures, results = Figures(), list[MinibatchResult]()
    with trainer.session.timers("training"):
        for number, minibatch in enumerate(minibatches):
            with _probed(trainer, batch, figures, first=number == 0):
                if number == len(minibatches) - 1:
                    _attribute(trainer, minibatch, figures)
                results.append(_train(trainer, minibatch, number))
    figures.metrics |= _policy_metrics(results)
    # A bank's answers all say version 0, whatever weights they were sampled with.
    banked = trainer.session.config.rollout.bank is not None
    equal_weights = not banked and batch.versions == {trainer.progress.policy_version}
    figures.add(replay_figures(trainer, results, equal_weights))
    if trainer.optimizer.predictor is not None:
        taught = [one.update.predictor for one in results if one.update.predictor is not None]
        packs = [one.pack for result in results for one in result.packs]
        figures.metrics |= trainer.optimizer.predictor.metrics(taught, packs)
    if trainer.recorder is not None:
        trained, model = [result.packs for result in results], trainer.session.model
        figures.add(routing_figures(model, trainer.recorder.layers, trained, equal_weights, Lags.of_step(trainer)))
    figures.metrics |= _mismatch_metrics(trainer, results)
    return figures


def _train(trainer: Trainer, minibatch: Minibatch, number: int) -> MinibatchResult:
    session, config = trainer.session, trainer.session.config
    settings = PolicySettings(config.algorithm, config.rollout.temperature, config.rollout.max_response_tokens)
    result = train_minibatch(session.model, trainer.optimizer, minibatch, settings, trainer.recorder)
    if result.update.skipped:
        dump_skipped(trainer, minibatch, result, number)
    if config.algorithm.old_log_probs == "rollout" or number >= first_scored(config):
        return result
    return replace(result, packs=with_own_forward(result.packs))


@contextlib.contextmanager
def _probed(trainer: Trainer, batch: Batch, figures: Figures, first: bool) -> Iterator[None]:
    """Measures what the first update does to a fixed set of sequences, in the steps that are to."""
    session, recorder = trainer.session, trainer.recorder
    if not first or recorder is None or not _due(trainer, session.config.routing.probe_interval):
        yield
        return
    with session.timers("routing"):
        probe = Probe(session.model, recorder, _probe_packs(trainer, batch))
    yield
    with session.timers("routing"):
        figures.add(probe.figures())


def _probe_packs(trainer: Trainer, batch: Batch) -> list[TrainingPack]:
    session = trainer.session
    if trainer.probe_packs is None:
        chosen = together(
            lambda: probe_set(
                session.run_path,
                batch.samples,
                session.config.rollout.samples_per_prompt,
                session.config.routing.probe_sequences,
                resumed=trainer.progress.step > 0,
                main=session.groups.is_main,
            )
        )
        trainer.probe_packs = pack_share(chosen, session.groups, session.config)
    return trainer.probe_packs


def _attribute(trainer: Trainer, minibatch: Minibatch, figures: Figures) -> None:
    """Splits the log-ratios that the updates before have made, in the steps that are to."""
    session, config = trainer.session, trainer.session.config
    if config.routing.attribution and _due(trainer, config.routing.attribution_interval):
        seed = config.seed + trainer.progress.step + 1
        with session.timers("routing"):
            figures.add(attribution_figures(session.model, config, minibatch.packs, seed))


def _due(trainer: Trainer, interval: int) -> bool:
    return bool(interval) and (trainer.progress.step + 1) % interval == 0


def _policy_metrics(results: Sequence[MinibatchResult]) -> dict[str, float]:
    return {
        **_merged(result.statistics for result in results).to_metrics(),
        "optimizer/grad_norm": sum(result.update.grad_norm for result in results) / len(results),
        "optimizer/learning_rate": results[-1].update.learning_rate,
        "optimizer/skipped_updates": sum(result.update.skipped for result in results),
    }


def _mismatch_metrics(trainer: Trainer, results: Sequence[MinibatchResult]) -> dict[str, float]:
    """Rollout engine against trainer, SPEC section 3, and the weights that training puts against it.

    The trainer's weights are those that the step began with. So were the engine's, unless answers were sampled ahead:
    then the figures are by lag too, of which lag 0 alone is at equal weights.
    Without the trainer's old log-probs only the first mini-batch's own forward has seen the rollout's weights.
    """
    algorithm = trainer.session.config.algorithm
    pairs = [(one.pack, one.pack.old_log_probs_T) for result in results for one in result.packs]
    if algorithm.old_log_probs == "rollout":
        pairs = [(one.pack, one.log_probs_T) for one in results[0].packs]
    here = [(one, log_probs_T) for one, log_probs_T in pairs if log_probs_T is not None]
    found = [mismatch(log_probs_T, one.pack.rollout_log_probs_T, one.segments) for one, log_probs_T in here]
    metrics, lags = _over_ranks(trainer, found), Lags.of_step(trainer)
    if lags is not None:
        by_lag = [
            mismatch_by_lag(log_probs_T, one.pack.rollout_log_probs_T, lags.of(one.pack), lags.count)
            for one, log_probs_T in here
        ]
        metrics |= _over_ranks(trainer, by_lag)
    if algorithm.mismatch.correction != "none":
        corrections = [correction_of(one, log_probs_T, algorithm.mismatch)[1] for one, log_probs_T in here]
        metrics |= _over_ranks(trainer, corrections)
    return metrics


def _merged(statistics: Iterable[S]) -> S:
    return reduce(lambda one, other: one.merge(other), statistics)


def _over_ranks(trainer: Trainer, found: Sequence[Statistics]) -> dict[str, float]:
    """The metrics of statistics by pack, which the last stage has. Collective."""
    groups = trainer.session.groups
    statistics = reduce_statistics(_merged(found), groups.data).cpu() if found else None
    reduced = from_last_stage(statistics, groups)
    metrics: dict[str, float] = reduced.to_metrics()
    return metrics
