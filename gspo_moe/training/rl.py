"""One RL step in two halves: collect a batch, learn from it."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Takes one RL step, and moves `trainer` on. Collective."""
    with trainer.session.timers("step"):
        batch = collect(trainer)
        figures = learn(trainer, batch)
        synced = trainer.finish_step(batch.prompts, trainer.session.config.algorithm.mini_batches)
    metrics = {**batch.metrics, **figures.metrics, **synced, "policy_version": trainer.progress.policy_version}
    return StepResult(metrics, batch, figures.layers)
