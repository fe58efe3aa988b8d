"""The training loop on one page: evaluate, step, log, checkpoint, evaluate, export."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gspo_moe.config.continuing import record_run
from gspo_moe.evaluation.evaluate import evaluation_metrics
from gspo_moe.model.hf import export_hf
from gspo_moe.observability.layers import LayerWriter
from gspo_moe.observability.metrics import MetricsWriter
from gspo_moe.observability.progress import Progress
from gspo_moe.observability.samples import SampleWriter
from gspo_moe.platform import device, peak_rss_gib
from gspo_moe.training.checkpoint import save_checkpoint
from gspo_moe.training.rl import StepResult, rl_step
from gspo_moe.training.session import Plan, Trainer, open_session, open_trainer
from gspo_moe.training.sft import sft_step


class RunLog:
    """The run's files, written by the main process alone; the others' calls do nothing."""

    def __init__(self, trainer: Trainer) -> None:
        config, step = trainer.session.config, trainer.progress.step
        self._samples_per_step = config.logging.samples_per_step
        self._main = trainer.session.groups.is_main
        if self._main:
            path = trainer.session.run_path
            record_run(config)
            self._metrics = MetricsWriter(
                path, resume_step=step, wandb=config.logging.wandb, config_dump=config.model_dump(mode="json")
            )
            self._samples = SampleWriter(path, resume_step=step)
            self._layers = LayerWriter(path, resume_step=step)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._main:
            self._metrics.write(step, metrics)

    def layers(self, step: int, figures: Mapping[str, np.ndarray]) -> None:
        if self._main:
            self._layers.append(step, figures)

    def flush(self) -> None:
        """Brings everything written so far to disk, for a checkpoint that the run may continue from."""
        if self._main:
            self._layers.flush()

    def samples(self, step: int, result: StepResult) -> None:
        """Keeps the first rollout of each of the step's first groups."""
        if not self._main:
            return
        size = len(result.answers.groups[0].rewards)
        for index, scored in enumerate(result.answers.groups[: self._samples_per_step]):
            rollout = scored.group.rollouts[0]
            self._samples.write(
                step=step,
                uid=scored.group.prompt.uid,
                prompt=scored.group.prompt.text,
                response=rollout.text,
                reward=scored.rewards[0],
                advantage=result.advantages[index * size],
                finished=rollout.finished,
            )

    def close(self) -> None:
        if self._main:
            self._metrics.close()
            self._layers.flush()
            self._samples.close()


def train(plan: Plan) -> bool:
    """Runs or continues the run that `plan` describes; False for a finished one, which stays as it is. Collective."""
    session = open_session(plan)
    trainer = open_trainer(session)
    config, export = plan.config, session.run_path / "hf"
    unfinished = trainer.progress.step < config.schedule.steps
    if unfinished:
        _run(trainer)
    if config.checkpoint.export_hf:
        export_hf(session.model, export, plan.tokenizer)
    session.close()
    return unfinished


def _run(trainer: Trainer) -> None:
    config, log = trainer.session.config, RunLog(trainer)
    steps, shown = config.schedule.steps, trainer.session.groups.is_main and config.logging.progress
    if trainer.progress.step == 0:
        _evaluate(trainer, log)
    with Progress(steps, done=trainer.progress.step, enabled=shown) as progress:
        while trainer.progress.step < steps:
            progress.update(trainer.progress.step + 1, _step(trainer, log))
            if _due(trainer.progress.step, config.evaluation.interval, steps):
                _evaluate(trainer, log)
            if _due(trainer.progress.step, config.checkpoint.interval, steps):
                _save(trainer, log)
    _evaluate(trainer, log)
    _save(trainer, log)
    log.close()


def _due(step: int, interval: int, steps: int) -> bool:
    """Every `interval` steps, but not at the end, which has its own."""
    return bool(interval) and step % interval == 0 and step < steps


def _step(trainer: Trainer, log: RunLog) -> dict[str, float]:
    session = trainer.session
    if session.config.stage == "rl":
        outcome = rl_step(trainer)
        metrics = outcome.metrics
        log.samples(trainer.progress.step, outcome)
        log.layers(trainer.progress.step, outcome.layers)
    else:
        metrics = sft_step(trainer)
    timings = session.timers.take()
    metrics |= timings
    metrics["throughput/tokens_per_second"] = metrics["throughput/tokens"] / timings["timing/step_seconds"]
    if "timing/rollout_seconds" in timings:  # not where rollouts come from a bank
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / timings["timing/rollout_seconds"]
    metrics["memory/peak_rss_gib"] = peak_rss_gib()
    if device().kind == "cuda":
        metrics["memory/peak_device_gib"] = device().peak_memory_gib()
    log.metrics(trainer.progress.step, metrics)
    return metrics


def _evaluate(trainer: Trainer, log: RunLog) -> None:
    session = trainer.session
    if not session.config.evaluation.prompts:
        return
    with session.timers("evaluation"):
        answers = session.evaluate(trainer.progress.policy_version)
    log.metrics(trainer.progress.step, evaluation_metrics(answers) | session.timers.take())


def _save(trainer: Trainer, log: RunLog) -> None:
    session = trainer.session
    log.flush()
    with session.timers("checkpoint"):
        save_checkpoint(
            trainer.checkpoints, session.model, trainer.optimizer, trainer.progress, session.config.checkpoint.keep
        )
    log.metrics(trainer.progress.step, session.timers.take())
