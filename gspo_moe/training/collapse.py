"""What `guard.action` does to a run whose figures have left their bounds: end it, or take it back and go on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from gspo_moe.config.checkpoints import checkpoint_name, checkpoints, set_aside
from gspo_moe.config.continuing import METRICS_FILE
from gspo_moe.errors import CollapseError
from gspo_moe.observability.jsonl import read_json_lines
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.stop import on_main, together
from gspo_moe.training.guard import Collapse
from gspo_moe.training.resuming import go_on
from gspo_moe.training.roll_backs import RollBack, write_roll_backs
from gspo_moe.training.run_log import RunLog
from gspo_moe.training.session import Trainer

_log = logging.getLogger(__name__)


def look(trainer: Trainer, metrics: dict[str, float]) -> Collapse | None:
    """Has the guard, where there is one, look at a step's metrics, to which it adds its own. Collective."""
    guard, step = trainer.guard, trainer.progress.step
    if not guard.watches:
        return None
    # The first rank's: all must find the same.
    found = guard.look(step, gather_objects(guard.wanted(metrics))[0])
    metrics |= {"guard/bad_steps": guard.bad_steps(step), "guard/roll_backs": len(trainer.roll_backs)}
    return found


def remember(trainer: Trainer) -> None:
    """Has the guard look again at the steps before those to come, as far as the run has logged them. Collective."""
    if not trainer.guard.watches or not trainer.progress.step:
        return
    file = trainer.session.run_path / METRICS_FILE

    def logged() -> dict[int, dict[str, float]]:
        steps: dict[int, dict[str, float]] = {}
        for record in read_json_lines(file)[0] if file.exists() else ():
            values = {name: float("nan") if value is None else value for name, value in record.items()}
            steps.setdefault(record["step"], {}).update(trainer.guard.wanted(values))
        return steps

    for step, values in sorted(on_main(logged).items()):
        if values:
            trainer.guard.look(step, values)


def act(trainer: Trainer, log: RunLog, found: Collapse) -> None:
    """Takes the run back, or raises CollapseError, on every rank. Collective."""
    options, before = trainer.session.config.guard, on_main(lambda: _sound_checkpoint(trainer, found))
    if options.action == "stop":
        raise _end(found, before, "guard.action=stop ends the run")
    if len(trainer.roll_backs) >= options.roll_backs:
        raise _end(found, before, f"guard.roll_backs={options.roll_backs} allows to go back no further time")
    if before is None:
        raise _end(found, before, "there is nothing to go back to")
    _roll_back(trainer, log, found, before)


def _sound_checkpoint(trainer: Trainer, found: Collapse) -> Path | None:
    """The newest from before the weights that the first bad step's answers came from."""
    sound = [one for one in checkpoints(trainer.checkpoints) if one.name < checkpoint_name(found.first - 1)]
    return sound[-1] if sound else None


def _end(found: Collapse, before: Path | None, why: str) -> CollapseError:
    fix = "lower optimizer.lr, look at the reward and at samples.jsonl, or widen the bounds of guard"
    if before is None:
        return CollapseError(f"{found.words}; {why}: {fix}. No checkpoint is from before step {found.first}")
    return CollapseError(f"{found.words}; {why}: {fix}. {before} is from before that", saves=False)


def _roll_back(trainer: Trainer, log: RunLog, found: Collapse, before: Path) -> None:
    folder, options, number = trainer.session.run_path, trainer.session.config.guard, len(trainer.roll_backs) + 1
    place, step = trainer.progress.prompts, int(before.name.removeprefix("step_"))
    done = RollBack(step, found.last, place.next, found.words, place.pending)

    def set_back() -> None:
        for later in checkpoints(trainer.checkpoints):
            if later.name > before.name:
                set_aside(later, "collapsed")
        shutil.copyfile(folder / METRICS_FILE, folder / f"before_roll_back_{number}.{METRICS_FILE}")
        write_roll_backs(folder, [*trainer.roll_backs, done])
        _log.warning(
            "%s: the run goes on from %s with other prompts and %.3g times the configured learning rate; roll-back %d "
            "of at most %d",
            found.words,
            before,
            options.lr_factor**number,
            number,
            options.roll_backs,
        )

    on_main(set_back)
    trainer.forget_prompts()
    trainer.guard.forget()
    go_on(trainer)
    together(lambda: log.go_back(trainer.progress.step))
