"""One RL step in two halves: collect a batch, learn from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gspo_moe.training.batch import Batch
from gspo_moe.training.collect import collect
from gspo_moe.training.learn import learn
from gspo_moe.training.session import Trainer


@dataclass(frozen=True)
class StepResult:
    """metrics: over all ranks, for the log. layers: figures by layer, over all ranks, for their own file."""

    metrics: dict[str, float]
    batch: Batch
    layers: dict[str, np.ndarray]


def rl_step(trainer: Trainer) -> StepResult:
    """Takes one RL step, moves `trainer.progress` on and publishes the weights. Collective."""
    session, progress = trainer.session, trainer.progress
    with session.timers("step"):
        batch = collect(trainer)
        learned = learn(trainer, batch)
    trainer.prompts.done(batch.prompts)
    position = trainer.prompts.position
    trainer.progress = replace(
        progress,
        step=progress.step + 1,
        prompt_position=position.next,
        prompts_pending=position.pending,
        policy_version=progress.policy_version + learned.updates,
    )
    session.sink.publish(session.model, trainer.progress.policy_version)
    metrics = {**batch.metrics, **learned.figures.metrics, "policy_version": trainer.progress.policy_version}
    return StepResult(metrics, batch, learned.figures.layers)
