"""When a run may be saved: never with broken weights over good ones, and at its end whatever ends it."""

from __future__ import annotations

from pathlib import Path

from gspo_moe.config.checkpoints import checkpoint_name, checkpoints, newest_checkpoint
from gspo_moe.config.continuing import recorded_run
from gspo_moe.config.lease import lost
from gspo_moe.errors import TrainingError
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.training.checkpoint import save_checkpoint
from gspo_moe.training.run_log import RunLog
from gspo_moe.training.session import Trainer


def last_saved(trainer: Trainer) -> str:
    """In words."""
    newest = newest_checkpoint(trainer.checkpoints)
    return f"{newest} holds its last checkpoint" if newest is not None else "Nothing is saved"


def save_whole_step(trainer: Trainer, log: RunLog) -> str:
    """Saves what the last whole step left, if that is not saved yet; what came of it, in words. Collective."""
    step, newest = trainer.progress.step, newest_checkpoint(trainer.checkpoints)
    if not trainer.session.config.checkpoint.keep:
        return "Nothing is saved, as checkpoint.keep=0 asks"
    where = last_saved(trainer)
    if trainer.optimizer.updates != trainer.progress.policy_version:
        return f"{where}: the step that it was in had changed the weights"
    if step and (newest is None or newest.name < checkpoint_name(step)):
        try:
            where = f"{save(trainer, log)} holds its last whole step"
        except TrainingError as error:
            return str(error)
    return f"{where}; the same command goes on from there" if step else f"{where}: no step was whole"


def save(trainer: Trainer, log: RunLog) -> Path | None:
    """The checkpoint written, None where `checkpoint.keep` is 0. Collective.

    Raises, on every rank, TrainingError where weights or the optimizer's state are not finite, or weights are not alike
    that must be, and OutputError where another process has taken the run's folder. What is from before the first of the
    latest steps out of the bounds of `guard` is kept too.
    """
    session = trainer.session
    raise_everywhere(lost() or _broken(trainer))
    if session.config.parallel.check_interval:
        trainer.replicas(trainer.progress.step)
    log.flush()
    if not session.config.checkpoint.keep:
        return None
    with session.timers("checkpoint"):
        saved = save_checkpoint(
            trainer.checkpoints,
            session.model,
            trainer.optimizer,
            trainer.progress,
            session.config.checkpoint.keep + _since_bad(trainer),
            session.plan.tokenizer,
            recorded_run(session.run_path) if session.groups.is_main else None,
        )
    log.metrics(trainer.progress.step, session.timers.take())
    return saved


def _since_bad(trainer: Trainer) -> int:
    """Checkpoints since figures left their bounds, with the one to come."""
    first = trainer.guard.first_bad
    if first is None:
        return 0
    return 1 + sum(one.name >= checkpoint_name(first) for one in checkpoints(trainer.checkpoints))


def _broken(trainer: Trainer) -> TrainingError | None:
    """What this rank finds broken. One wait for the device where nothing is."""
    if trainer.optimizer.is_finite():
        return None
    chunks = trainer.session.model.gpt_chunks
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    broken = [name for name, parameter in named if not parameter.isfinite().all()]
    what = f"{', '.join(broken[:3])} and {len(broken)} weights in all" if broken else "Adam's moments"
    return TrainingError(
        f"not finite after step {trainer.progress.step}, which is therefore not saved: {what}; go on from the "
        "checkpoint before, if there is one, with a lower optimizer.lr"
    )
