"""When a run may be saved: never with broken weights over good ones, and at its end whatever ends it.

A save that fails leaves the checkpoints before it, and the run goes on: a warning and `checkpoint/failures` tell of it.
Where the run's folder takes nothing any more, the run ends, and its last whole step is saved elsewhere.
"""

from __future__ import annotations

import errno
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

from gspo_moe.config.checkpoints import checkpoint_name, checkpoints, newest_checkpoint
from gspo_moe.config.continuing import recorded_run
from gspo_moe.config.lease import lost
from gspo_moe.errors import ConfigError, OutputError, SaveError, TrainingError
from gspo_moe.parallel.stop import WorkError, largest, on_main, raise_everywhere, together
from gspo_moe.training.checkpoint import BegunSave, Destination, begin_save, save_checkpoint
from gspo_moe.training.run_log import RunLog
from gspo_moe.training.session import Trainer

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EPERM)
_log = logging.getLogger(__name__)


def after_step(trainer: Trainer, log: RunLog) -> None:
    """Puts a checkpoint in its place that all ranks have written meanwhile. Collective.

    Raises OutputError where the run's folder is gone.
    """
    found = largest(2 if log.is_gone() else trainer.saving is not None and trainer.saving.is_writing)
    if found == 2:
        raise _ended(trainer, f"{trainer.session.run_path} is gone: it was removed, moved or unmounted")
    if found == 0:
        finish_saving(trainer, log)


def save(trainer: Trainer, log: RunLog) -> None:
    """Saves, or with `checkpoint.background` begins to; the save before is waited for. Collective.

    Raises, on every rank, TrainingError where weights or the optimizer's state are not finite, or weights are not alike
    that must be, and OutputError where the run's folder takes nothing any more or another process has taken it. What is
    from before the first of the latest steps out of the bounds of `guard` is kept too.
    """
    _check(trainer)
    finish_saving(trainer, log)
    if not trainer.session.config.checkpoint.keep:
        return
    if trainer.session.config.checkpoint.background:
        _try(trainer, log, lambda: setattr(trainer, "saving", _begin(trainer, log, background=True)))
        return
    _try(trainer, log, lambda: _begin(trainer, log).finish())
    taken = trainer.session.timers.take()
    if taken:
        log.metrics(trainer.progress.step, taken)


def finish_saving(trainer: Trainer, log: RunLog) -> None:
    """Waits for the save that is under way, if one is. Collective. Raises OutputError as `save` does."""
    begun, trainer.saving = trainer.saving, None
    if begun is not None:
        _try(trainer, log, begun.finish)
        trainer.given_up = begun if begun.is_writing else None


def save_last(trainer: Trainer, log: RunLog) -> None:
    """At the end of a run. Collective. Raises as `save` does, and OutputError where it cannot be saved at all."""
    _check(trainer)
    finish_saving(trainer, log)
    try:
        if not trainer.session.config.checkpoint.keep:
            _flush(log)
            return
        with trainer.session.timers("checkpoint"):
            _begin(trainer, log).finish()
    except SaveError as error:
        raise _ended(trainer, str(error)) from error
    log.metrics(trainer.progress.step, trainer.session.timers.take())


def last_saved(trainer: Trainer) -> str:
    """In words. Collective."""
    return _held_by(_newest(trainer))


def _newest(trainer: Trainer) -> Path | None:
    return on_main(lambda: newest_checkpoint(trainer.checkpoints))


def _held_by(newest: Path | None) -> str:
    return f"{newest} holds its last checkpoint" if newest is not None else "Nothing is saved"


def save_whole_step(trainer: Trainer, log: RunLog) -> str:
    """Saves what the last whole step left, if that is not saved yet; what came of it, in words. Collective."""
    if largest(log.is_gone()):
        return f"{trainer.session.run_path} is gone. {_rescue(trainer)}"
    begun, trainer.saving = trainer.saving, None
    try:
        if begun is not None:
            begun.finish()
    except SaveError as error:
        return f"{error}. {_rescue(trainer)}"
    if not trainer.session.config.checkpoint.keep:
        return "Nothing is saved, as checkpoint.keep=0 asks"
    step, newest = trainer.progress.step, _newest(trainer)
    if trainer.optimizer.updates != trainer.progress.policy_version:
        return f"{_held_by(newest)}: the step that it was in had changed the weights"
    if not step:
        return f"{_held_by(newest)}: no step was whole"
    if newest is None or newest.name < checkpoint_name(step):
        try:
            _check(trainer)
            newest = _begin(trainer, log).finish()
        except TrainingError as error:
            return str(error)
        except SaveError as error:
            return f"{error}. {_rescue(trainer)}"
    return f"{newest} holds its last whole step; the same command goes on from there"


def _begin(trainer: Trainer, log: RunLog, *, background: bool = False) -> BegunSave:
    """Raises SaveError, also where what the run has logged cannot be written: a run that goes on would lack it."""
    if largest(trainer.given_up is not None and trainer.given_up.is_writing):
        raise SaveError("no checkpoint could be written: the writer of one before, which was given up, is still at it")
    _flush(log)
    session, config = trainer.session, trainer.session.config.checkpoint
    try:
        run = on_main(lambda: recorded_run(session.run_path))
    except (OSError, ConfigError) as error:
        raise SaveError(f"no checkpoint could be written ({error})") from error
    # Half of what ranks wait for each other: those whose writers are done wait meanwhile.
    patience = 30 * session.config.parallel.timeout_minutes
    keep = config.keep + on_main(lambda: _since_bad(trainer))
    place = Destination(trainer.checkpoints, keep, config.keep_every, session.plan.tokenizer, run, patience)
    return begin_save(place, session.model, trainer.optimizer, trainer.progress, background=background)


def _flush(log: RunLog) -> None:
    try:
        together(log.flush)
    except (OSError, WorkError) as error:
        raise SaveError(f"what the run has logged could not be written ({error})") from error


def _try(trainer: Trainer, log: RunLog, work: Callable[[], object]) -> None:
    """A save, or a part of one, that may fail."""
    try:
        with trainer.session.timers("checkpoint"):
            work()
    except SaveError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in GONE:
            raise _ended(trainer, str(error)) from error
        trainer.failed_saves += 1
        newest = _newest(trainer)
        if trainer.session.groups.is_main:
            left = f"{newest} is still the newest one" if newest is not None else "there is none yet"
            _log.warning("%s; the run goes on, and %s", error, left)
        log.metrics(trainer.progress.step, {"checkpoint/failures": trainer.failed_saves})


def _ended(trainer: Trainer, why: str) -> OutputError:
    return OutputError(f"{why}. {_rescue(trainer)}")


def _rescue(trainer: Trainer) -> str:
    """Saves the last whole step in another place than the run's folder; what came of it, in words. Collective."""
    path, asked = trainer.session.run_path, trainer.session.config.checkpoint.rescue
    named = f"{path.name}-{zlib.crc32(str(path.absolute()).encode()):08x}"  # runs may share the folder
    folder = Path(asked) / named if asked is not None else path.with_name(f"{path.name}.rescued")
    if not trainer.session.config.checkpoint.keep:
        return "Nothing is saved, as checkpoint.keep=0 asks"
    if not trainer.progress.step:
        return "No step was whole"
    if trainer.optimizer.updates != trainer.progress.policy_version:
        return "The step that it was in had changed the weights, which are not saved"
    try:
        raise_everywhere(_broken(trainer))
        tokenizer = trainer.session.plan.tokenizer
        saved = save_checkpoint(
            folder, trainer.session.model, trainer.optimizer, trainer.progress, keep=0, tokenizer=tokenizer
        )
    except (SaveError, TrainingError) as error:
        return f"Nor is it saved elsewhere: {error}"
    return f"{saved} holds its last whole step: move that to {trainer.checkpoints} and start the same command to go on"


def _since_bad(trainer: Trainer) -> int:
    """Checkpoints since figures left their bounds, with the one to come."""
    first = trainer.guard.first_bad
    if first is None:
        return 0
    return 1 + sum(one.name >= checkpoint_name(first - 1) for one in checkpoints(trainer.checkpoints))


def _check(trainer: Trainer) -> None:
    """Raises, on every rank, where what is there must not be saved. Collective."""
    raise_everywhere(lost() or _broken(trainer))
    if trainer.session.config.parallel.check_interval:
        trainer.replicas(trainer.progress.step)


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
