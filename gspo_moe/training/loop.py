"""The training loop on one page: evaluate, step, log, checkpoint, evaluate, export."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

from gspo_moe.config.continuing import FINISHED_FILE
from gspo_moe.errors import RunError, TrainingError
from gspo_moe.evaluation.answers import write_answers
from gspo_moe.evaluation.evaluate import evaluation_metrics
from gspo_moe.files import write_whole
from gspo_moe.kernels import kernels
from gspo_moe.model.hf import export_hf
from gspo_moe.observability.header import header_rows
from gspo_moe.observability.progress import Progress, show_header
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.parallel.stop import on_main, together
from gspo_moe.platform import device, peak_rss_gib
from gspo_moe.training import collapse
from gspo_moe.training.first_step import tell_first_step
from gspo_moe.training.guard import Collapse
from gspo_moe.training.resuming import open_trainer
from gspo_moe.training.rl import rl_step
from gspo_moe.training.run_log import RunLog
from gspo_moe.training.saving import after_step, finish_saving, last_saved, save, save_last, save_whole_step
from gspo_moe.training.session import Plan, Trainer, open_session
from gspo_moe.training.sft import sft_step
from gspo_moe.training.shown import show_prompt
from gspo_moe.training.watch import Watch

_log = logging.getLogger(__name__)


def train(plan: Plan, stop: StopSignals | None = None) -> bool:
    """Runs or continues the run that `plan` describes; False for a finished one, which stays as it is. Collective.

    stop: entered by the caller, so that signals end nothing else, neither while an error's last step is being saved.
    Raises RunError for what ends the run; the last whole step is then saved.
    """
    session = open_session(plan, stop)
    try:
        trainer = open_trainer(session)
        config, export = plan.config, session.run_path / "hf"
        unfinished = trainer.unfinished
        with Watch(trainer) as watch:
            if unfinished:
                if session.groups.is_main and config.logging.progress:
                    print(show_prompt(plan), file=sys.stderr, flush=True)
                _run(trainer, watch)
            if config.checkpoint.export_hf:
                export_hf(session.model, export, plan.tokenizer)
        if not config.checkpoint.keep:
            on_main(lambda: write_whole(session.run_path / FINISHED_FILE, f"{trainer.progress.step} steps\n"))
        return unfinished
    finally:
        session.close()


def _run(trainer: Trainer, watch: Watch) -> None:
    log = together(lambda: RunLog(trainer))
    try:
        _steps(trainer, log, watch)
    except RunError as error:
        error.args = (f"{error}. {save_whole_step(trainer, log) if error.saves else last_saved(trainer)}",)
        raise
    finally:
        log.close()


def _steps(trainer: Trainer, log: RunLog, watch: Watch) -> None:
    session, config = trainer.session, trainer.session.config
    steps, shown = config.schedule.steps, session.groups.is_main and config.logging.progress
    if shown:
        _show_header(trainer)
    if trainer.progress.step == 0 or trainer.progress.evaluation_due:
        _evaluate(trainer, log)
    collapse.remember(trainer)
    begun = trainer.progress.step
    with Progress(steps, done=begun, enabled=shown) as progress:
        while trainer.progress.step < steps:
            session.stop.check()
            metrics, collapsed = _step(trainer, log)
            watch.step_is_done()
            progress.update(trainer.progress.step, metrics)
            if trainer.progress.step == begun + 1:
                tell_first_step(session, metrics)
            after_step(trainer, log)
            _check_updates(trainer)
            if collapsed is not None:
                finish_saving(trainer, log)
                collapse.act(trainer, log, collapsed)
                continue
            if trainer.progress.step == steps or _due(trainer.progress.step, config.evaluation.interval, steps):
                _evaluate(trainer, log)
            if _due(trainer.progress.step, config.checkpoint.interval, steps):
                save(trainer, log)
    save_last(trainer, log)


def _show_header(trainer: Trainer) -> None:
    session = trainer.session
    plan, groups = session.plan, session.groups
    used = " - ".join(part for part in kernels().summary if part)
    step = trainer.progress.step
    processes = groups.world_size
    show_header(header_rows(plan.config, plan.layout, plan.architecture, processes=processes, kernels=used, step=step))


def _due(step: int, interval: int, steps: int) -> bool:
    """Every `interval` steps, but not at the end, which has its own."""
    return bool(interval) and step % interval == 0 and step < steps


def _step(trainer: Trainer, log: RunLog) -> tuple[dict[str, float], Collapse | None]:
    """Metrics, and what `guard` finds in them."""
    session = trainer.session
    if session.config.stage == "rl":
        outcome = rl_step(trainer)
        metrics = outcome.metrics
        log.samples(trainer.progress.step, outcome)
        log.layers(trainer.progress.step, outcome.layers)
        metrics |= session.server_metrics()
    else:
        metrics = sft_step(trainer)
    interval = session.config.parallel.check_interval
    if interval and trainer.progress.step % interval == 0:
        with session.timers("replicas"):
            trainer.replicas(trainer.progress.step)
    timings = session.timers.take()
    metrics |= timings
    metrics["throughput/tokens_per_second"] = metrics["throughput/tokens"] / timings["timing/step_seconds"]
    # None where rollouts come from a bank; those that are sampled while training runs have the whole step.
    sampling = timings.get("timing/rollout_seconds", timings["timing/step_seconds"] if "lag/mean" in metrics else None)
    if sampling is not None:
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / sampling
    metrics["memory/peak_rss_gib"] = peak_rss_gib()
    if device().kind == "cuda":
        metrics["memory/peak_device_gib"] = device().peak_memory_gib()
    found = collapse.look(trainer, metrics)
    log.metrics(trainer.progress.step, metrics)
    return metrics, found


def _evaluate(trainer: Trainer, log: RunLog) -> None:
    session, options = trainer.session, trainer.session.config.evaluation
    if not options.prompts:
        return
    trainer.progress = replace(trainer.progress, evaluation_due=True)
    with session.timers("evaluation"):
        groups = session.evaluate(f"after step {trainer.progress.step}")
    trainer.progress = replace(trainer.progress, evaluation_due=False)
    if options.keep_answers and session.groups.is_main:
        file = session.run_path / "evaluations" / f"step_{trainer.progress.step}.jsonl"
        try:
            write_answers(file, groups)
        except OSError as error:
            _log.warning("%s cannot be written (%s): these answers are not kept", file, error.strerror)
    session.server_metrics()  # what was asked for here is no step's
    log.metrics(trainer.progress.step, evaluation_metrics(groups, options.pass_at) | session.timers.take())


def _check_updates(trainer: Trainer) -> None:
    """Warns of the first step with skipped updates in a row; raises TrainingError when they are too many."""
    skipped, limit = trainer.optimizer.skipped_in_a_row, trainer.session.config.optimizer.max_skipped_updates
    if not skipped:
        return
    fix = (
        "lower optimizer.lr, or look for what is too large: rewards, algorithm.kl.coeff, rollout.temperature, or the "
        "weights themselves; gspo-moe replay computes again what is in the run's folder skipped"
    )
    if skipped >= limit:
        raise TrainingError(
            f"the last {skipped} updates were skipped, as their loss or gradients were not finite, and optimizer."
            f"max_skipped_updates={limit} ends the run: {fix}"
        )
    if trainer.session.groups.is_main and skipped <= trainer.session.config.algorithm.mini_batches:
        _log.warning("the last %d updates were skipped, as their loss or gradients were not finite: %s", skipped, fix)
