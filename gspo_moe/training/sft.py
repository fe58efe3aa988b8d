"""One step of supervised training on the task's demonstrations."""

from __future__ import annotations

from gspo_moe.errors import ConfigError, DataError, TrainingError
from gspo_moe.training.demonstrations import training_sample
from gspo_moe.training.packs import pack_share
from gspo_moe.training.session import Plan, Trainer
from gspo_moe.training.step import train_supervised
from gspo_moe.types import Prompt, TrainingSample


def sft_step(trainer: Trainer) -> dict[str, float]:
    """Learns the next batch of demonstrations and moves `trainer` on. Collective."""
    session, config = trainer.session, trainer.session.config
    with session.timers("step"):
        prompts = trainer.prompts.take(config.schedule.sft_batch)
        samples = [demonstration(session.plan, prompt) for prompt in prompts]
        packs = pack_share(samples, session.groups, config)
        num_tokens = sum(sum(sample.response_mask) for sample in samples)
        statistics, update = train_supervised(session.model, trainer.optimizer, packs, num_tokens)
    trainer.finish_step(prompts, updates=1)
    return {
        **statistics.to_metrics(),
        "optimizer/grad_norm": update.grad_norm,
        "optimizer/learning_rate": update.learning_rate,
        "optimizer/skipped_updates": float(update.skipped),
        "throughput/tokens": float(sum(len(sample.token_ids) for sample in samples)),
    }


def demonstration(plan: Plan, prompt: Prompt) -> TrainingSample:
    """The prompt and the answer to learn. Raises TrainingError where `training_sample` finds a fault."""
    try:
        return training_sample(plan.renderer, prompt, plan.task.demonstration(prompt))
    except (ConfigError, DataError) as error:
        raise TrainingError(str(error)) from error
