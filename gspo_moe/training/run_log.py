"""What a run writes about itself: config, starts, metrics, layers, samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch.distributed as dist

from gspo_moe.config.continuing import record_run
from gspo_moe.observability.layers import LayerWriter
from gspo_moe.observability.metrics import MetricsWriter
from gspo_moe.observability.samples import Sample, SampleWriter
from gspo_moe.observability.starts import write_start
from gspo_moe.training.rl import StepResult
from gspo_moe.training.session import Trainer


class RunLog:
    """The run's files, written by the main process alone; the others' calls do nothing."""

    def __init__(self, trainer: Trainer) -> None:
        self._config, step = trainer.session.config, trainer.progress.step
        self._samples_per_step = self._config.logging.samples_per_step
        self._main = trainer.session.groups.is_main
        if self._main:
            record_run(self._config)
            plan = trainer.session.plan
            write_start(self._config.run_path, step, plan.layout, plan.architecture, dist.get_world_size())
            self._open(step)

    def _open(self, step: int) -> None:
        path, dump = self._config.run_path, self._config.model_dump(mode="json")
        self._metrics = MetricsWriter(path, resume_step=step, wandb=self._config.logging.wandb, config_dump=dump)
        self._samples = SampleWriter(path, resume_step=step)
        self._layers = LayerWriter(path, resume_step=step)

    def go_back(self, step: int) -> None:
        """Takes away what was written of later steps, as a start from a checkpoint of that step does."""
        if self._main:
            self.close()
            self._open(step)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._main:
            self._metrics.write(step, metrics)

    def layers(self, step: int, figures: Mapping[str, np.ndarray]) -> None:
        if self._main:
            self._layers.append(step, figures)

    def flush(self) -> None:
        """Brings everything written so far to disk, for a checkpoint that the run may continue from.

        Raises OSError or SafetensorError on the main process where the disk does not take it.
        """
        if self._main:
            self._metrics.flush()
            self._samples.flush()
            self._layers.flush()

    def is_gone(self) -> bool:
        """Whether the run's folder is no longer where it was; the main process alone looks."""
        return self._main and self._metrics.is_gone()

    def samples(self, step: int, result: StepResult) -> None:
        """Keeps the first rollout of each of the step's first groups."""
        if not self._main:
            return
        first = 0
        for group in result.batch.groups[: self._samples_per_step]:
            advantage = result.batch.samples[first].advantage
            self._samples.write(Sample.of(step, group.prompt, group.rollouts[0], advantage))
            first += len(group.rollouts)

    def close(self) -> None:
        if self._main:
            self._metrics.close()
            self._layers.try_flush()
            self._samples.close()
