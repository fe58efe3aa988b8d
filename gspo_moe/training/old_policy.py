"""What the passes before the first update find of each pack: old and reference log-probs, routes, values."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.scoring.score import score, score_with_values
from gspo_moe.training.critic import estimate, value_fault
from gspo_moe.training.packs import TrainingPack, microbatches, recordings_of, replay_of, with_each
from gspo_moe.training.routing import engine_routes
from gspo_moe.training.session import Trainer


def with_old_policy(trainer: Trainer, packs: Sequence[TrainingPack]) -> list[TrainingPack]:
    """The packs with all that their losses need of the old policy and of a reference. Collective."""
    config, timers = trainer.session.config, trainer.session.timers
    if config.routing.replay == "r3":
        packs = with_each(packs, replay_TLK=engine_routes(trainer.session.model, microbatches(packs)))
    with timers("old_log_probs"):
        if config.algorithm.old_log_probs == "rollout":
            packs = with_each(packs, old_log_probs_T=[one.pack.rollout_log_probs_T for one in packs])
        else:
            packs = _scored(trainer, packs)
    if config.routing.replay == "r2":
        packs = with_each(packs, replay_TLK=[one.routes_TLK for one in recordings_of(packs)])
    if trainer.reference is not None:
        with timers("reference"):
            found = score(trainer.reference, microbatches(packs), temperature=config.rollout.temperature)
        packs = with_each(packs, reference_log_probs_T=found)
    return list(packs)


def _scored(trainer: Trainer, packs: Sequence[TrainingPack]) -> list[TrainingPack]:
    config, model = trainer.session.config, trainer.session.model
    record = None if trainer.recorder is None else trainer.recorder.start()
    # R3's ratios compare like with like only where the old policy runs with the engine's routes as well.
    routes, temperature, whole = replay_of(packs), config.rollout.temperature, microbatches(packs)
    if not config.has_value_head:
        log_probs = score(model, whole, temperature=temperature, record=record, routes=routes)
        return with_each(packs, old_log_probs_T=log_probs, recording=[] if record is None else record.recordings())
    found = score_with_values(model, whole, temperature=temperature, record=record, routes=routes)
    segments = [(one.pack, one.segments) for one in packs]
    estimates = estimate(segments, [values_T for _, values_T in found], config.algorithm.settings, model.groups)
    raise_everywhere(value_fault(estimates))
    return with_each(
        packs,
        old_log_probs_T=[log_probs_T for log_probs_T, _ in found],
        recording=[] if record is None else record.recordings(),
        estimates=estimates,
    )
