"""Where a trainer starts: the beginning, the newest checkpoint, or the newest whole one, as its config says."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from gspo_moe.config.checkpoints import checkpoints, set_aside
from gspo_moe.config.continuing import recorded_run
from gspo_moe.errors import DamagedCheckpoint
from gspo_moe.model.build import Model
from gspo_moe.model.initial import build_reference
from gspo_moe.parallel.stop import on_main
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.training.checkpoint import Progress, load_checkpoint
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.roll_backs import FILE as ROLL_BACKS_FILE
from gspo_moe.training.roll_backs import after, read_roll_backs
from gspo_moe.training.session import Session, Trainer

_log = logging.getLogger(__name__)


def open_trainer(session: Session) -> Trainer:
    """Adds optimizer and recorder; continues from the run's newest complete checkpoint if there is one. Collective."""
    config = session.config
    updates = config.schedule.steps * (config.algorithm.mini_batches if config.stage == "rl" else 1)
    recorder = None
    if config.stage == "rl" and config.routing.record:
        recorder = RouteRecorder(
            session.model.chunks,
            session.model.architecture,
            session.groups,
            scores=True,
            gates=config.routing.replay == "recall",
        )
    optimizer = Optimizer(config, session.model, updates)
    reference = None
    if config.stage == "rl" and config.algorithm.kl.coeff:
        plan = session.plan
        reference = build_reference(config, plan.architecture, session.groups, plan.tokenizer.vocab_size)
    trainer = Trainer(session, optimizer, recorder, Progress(), reference)
    if on_main(lambda: checkpoints(trainer.checkpoints)):
        go_on(trainer)
        if session.groups.is_main and trainer.unfinished:
            print(f"continuing from step {trainer.progress.step} of {session.run_path}", file=sys.stderr, flush=True)
    else:
        of_a_run_without_checkpoint = session.run_path / ROLL_BACKS_FILE
        on_main(lambda: of_a_run_without_checkpoint.unlink(missing_ok=True))
        session.publish(0)
    return trainer


def go_on(trainer: Trainer) -> None:
    """Puts `trainer` where the run's newest checkpoint stands, and publishes its weights. Collective."""
    session, config = trainer.session, trainer.session.config
    trainer.roll_backs = tuple(on_main(lambda: read_roll_backs(session.run_path)))
    trainer.optimizer.lr_factor = config.guard.lr_factor ** len(trainer.roll_backs)
    progress = load_newest(
        trainer.checkpoints,
        session.model,
        trainer.optimizer,
        on_main(lambda: recorded_run(session.run_path)),
        config.checkpoint.on_damage,
    )
    trainer.progress, trainer.dumped_weights = after(trainer.roll_backs, progress), None
    session.publish(trainer.progress.policy_version)


def load_newest(
    folder: Path, model: Model, optimizer: Optimizer, run: str | None, on_damage: Literal["error", "previous"]
) -> Progress:
    """Loads the newest checkpoint of `folder`, which holds one. Collective over all ranks.

    run: as `load_checkpoint` has it. on_damage: `checkpoint.on_damage`.
    Raises CheckpointError as `load_checkpoint` does. A damaged one is moved aside, and a warning tells of it, where
    `on_damage` allows and there is one before; otherwise DamagedCheckpoint says what can be done.
    """
    while True:
        *before, newest = on_main(lambda: checkpoints(folder))
        try:
            return load_checkpoint(newest, model, optimizer, run)
        except DamagedCheckpoint as error:
            if on_damage == "error" or not before:
                raise DamagedCheckpoint(f"{error}\n{_fix(before)}") from error
            try:
                aside = on_main(partial(set_aside, newest))
            except OSError as refused:
                raise DamagedCheckpoint(
                    f"{error}\nIt cannot be moved aside ({refused.strerror}): see to the permissions of {folder}"
                ) from refused
            if dist.get_rank() == 0:
                _log.warning("%s\nIt is moved to %s, and the run goes on from %s", error, aside, before[-1])


def _fix(before: list[Path]) -> str:
    if not before:
        return "There is none before it: put an undamaged copy there, or name another logging.run_dir to start anew"
    return (
        f"Put an undamaged copy there, or go on from {before[-1].name} with checkpoint.on_damage=previous, which moves "
        "the damaged one aside"
    )
