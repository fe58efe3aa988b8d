"""What is found of each pack at the weights before the first update: old and reference log-probs, routes, values.

Strategy: the first mini-batch trains at those weights, so its own forward finds what a pass before it would. That pass
takes the later mini-batches alone, unless something needs the first one's old policy ahead of its training forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gspo_moe.config.routing import RoutingConfig
from gspo_moe.config.schema import Config
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.routing.prediction import Foretold, PredictedPass
from gspo_moe.routing.recorder import Recording, RoutePass
from gspo_moe.scoring.score import score, score_with_values
from gspo_moe.training.critic import estimate, value_fault
from gspo_moe.training.packs import Trained, TrainingPack, microbatches, recordings_of, replay_of, with_each
from gspo_moe.training.routing import engine_routes
from gspo_moe.training.session import Trainer


def first_scored(config: Config) -> int:
    """The first mini-batch that is scored before the updates: 0, or 1 where the first one's own forward will do.

    Values make advantages of a whole step, a router shift needs the old scores, and the noise floor of staleness
    compares the two passes at equal weights.
    """
    algorithm = config.algorithm
    has_floor = config.routing.record and algorithm.mini_batches > 1
    return 0 if config.has_value_head or algorithm.spec.router_shift or has_floor else 1


def with_old_policy(trainer: Trainer, packs: Sequence[TrainingPack]) -> list[TrainingPack]:
    """The packs with all that their losses need of the old policy and of a reference. Collective.

    Those of mini-batches before `first_scored` get from `with_own_forward` what their training forward finds.
    """
    config, timers = trainer.session.config, trainer.session.timers
    if config.routing.replay == "r3":
        packs = with_each(packs, replay_TLK=engine_routes(trainer.session.model, microbatches(packs)))
    with timers("old_log_probs"):
        if config.algorithm.old_log_probs == "rollout":
            packs = with_each(packs, old_log_probs_T=[one.pack.rollout_log_probs_T for one in packs])
        else:
            first = first_scored(config)
            later = [one for one in packs if one.minibatch >= first]
            packs = [one for one in packs if one.minibatch < first] + (_scored(trainer, later) if later else [])
    if config.routing.replays_old_pass:
        packs = with_each(packs, **_own_routes(packs, config.routing))
    if trainer.reference is not None:
        with timers("reference"):
            temperature = config.rollout.temperature
            found = score(trainer.reference, microbatches(packs), temperature=temperature, responses_only=True)
        packs = with_each(packs, reference_log_probs_T=found)
    return list(packs)


def _own_routes(packs: Sequence[TrainingPack], routing: RoutingConfig) -> dict[str, Sequence[Any]]:
    """What the later forwards replay of the old policy's pass, by field of the packs."""
    if routing.replay == "predict":
        foretold = [one.foretold for one in packs if one.foretold is not None]
        # At the old policy's weights there is nothing to learn.
        kept = [one if pack.minibatch else replace(one, seen=()) for one, pack in zip(foretold, packs, strict=True)]
        return {"replay_TLK": [one.routes_TLK for one in foretold], "foretold": kept}
    recordings = recordings_of(packs)
    found: dict[str, Sequence[Any]] = {"replay_TLK": [one.routes_TLK for one in recordings]}
    own = [one.own for one in recordings if one.own is not None]
    if routing.replay == "recall":
        found["gates_TLK"] = [one.gates_TLK for one in own if one.gates_TLK is not None]
    if routing.replay_margin is not None:
        found["held_TL"] = [one.margin_TL < routing.replay_margin for one in own]
    return found


def with_own_forward(trained: Sequence[Trained]) -> list[Trained]:
    """The first mini-batch's, where none was scored: its training forward is the old policy's pass too."""
    return [
        replace(
            one,
            pack=replace(one.pack, old_log_probs_T=one.log_probs_T, recording=one.recording),
            recording=None if one.recording is None else _against_itself(one.recording),
        )
        for one in trained
    ]


def _against_itself(recording: Recording) -> Recording:
    """What a second pass at equal weights records with the first one's routes as its reference."""
    scores = None if recording.own is None else recording.own.log_probs_TLK
    return Recording(recording.routes_TLK, reference_log_probs_TLK=scores)


def _scored(trainer: Trainer, packs: Sequence[TrainingPack]) -> list[TrainingPack]:
    config, model = trainer.session.config, trainer.session.model
    record, predictor = None if trainer.recorder is None else trainer.recorder.start(), trainer.optimizer.predictor
    predicted = None if predictor is None else predictor.start(record, forced=True)
    watch = record if predicted is None else predicted
    # R3's ratios compare like with like only where the old policy runs with the engine's routes as well.
    routes, temperature, whole = replay_of(packs), config.rollout.temperature, microbatches(packs)
    if not config.has_value_head:
        log_probs = score(model, whole, temperature=temperature, record=watch, routes=routes, responses_only=True)
        return with_each(packs, old_log_probs_T=log_probs, **_watched(record, predicted))
    found = score_with_values(model, whole, temperature=temperature, record=watch, routes=routes, responses_only=True)
    segments = [(one.pack, one.segments) for one in packs]
    estimates = estimate(segments, [values_T for _, values_T in found], config.algorithm.settings, model.groups)
    raise_everywhere(value_fault(estimates))
    return with_each(
        packs,
        old_log_probs_T=[log_probs_T for log_probs_T, _ in found],
        estimates=estimates,
        **_watched(record, predicted),
    )


def _watched(record: RoutePass | None, predicted: PredictedPass | None) -> dict[str, Sequence[Recording | Foretold]]:
    """By field of the packs. Collective over tensor and context ranks."""
    return {
        "recording": [] if record is None else record.recordings(),
        "foretold": [] if predicted is None else predicted.foretold(),
    }
