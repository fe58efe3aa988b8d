"""One step of supervised training on the task's demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import DataError, TrainingError
from gspo_moe.training.dump import dump_skipped
from gspo_moe.training.packs import Minibatch, pack_share
from gspo_moe.training.session import Plan, Trainer
from gspo_moe.training.step import train_supervised
from gspo_moe.types import Message, Prompt, TrainingSample


def sft_step(trainer: Trainer) -> dict[str, float]:
    """Learns the next batch of demonstrations and moves `trainer` on. Collective."""
    session, config = trainer.session, trainer.session.config
    with session.timers("step"):
        prompts = trainer.prompts.take(config.schedule.sft_batch)
        samples = [demonstration(session.plan, prompt) for prompt in prompts]
        num_tokens = sum(sum(sample.response_mask) for sample in samples)
        minibatch = Minibatch(tuple(pack_share(samples, session.groups, config)), len(samples), num_tokens)
        result = train_supervised(session.model, trainer.optimizer, minibatch)
        update = result.update
        if update.skipped:
            dump_skipped(trainer, minibatch, result, number=0)
    trainer.finish_step(prompts, updates=1)
    return {
        **result.statistics.to_metrics(),
        "optimizer/grad_norm": update.grad_norm,
        "optimizer/learning_rate": update.learning_rate,
        "optimizer/skipped_updates": float(update.skipped),
        "throughput/tokens": float(sum(len(sample.token_ids) for sample in samples)),
    }


def demonstration(plan: Plan, prompt: Prompt) -> TrainingSample:
    """The prompt and the answer to learn. Raises TrainingError where these are no sequence to learn from."""
    try:
        return training_sample(plan.renderer, prompt, plan.task.demonstration(prompt))
    except DataError as error:
        raise TrainingError(str(error)) from error


def training_sample(renderer: Renderer, prompt: Prompt, said: str | Sequence[Message]) -> TrainingSample:
    """The sequence to learn: loss on what the assistant says and on its end tokens.

    Text goes behind the prompt as the policy reads it, and the end token behind that. Messages are one conversation
    with the prompt's, a text prompt being the user's. Raises DataError, naming the prompt, where there is nothing to
    learn or the chat template refuses it; ConfigError for messages without a template.
    """
    try:
        if isinstance(said, str):
            question = renderer.prompt(prompt)
            if not question:
                raise DataError(f"prompt {prompt.uid} is empty; give at least one token")
            answer = renderer.answer(prompt, said)
            return TrainingSample((*question, *answer), (0,) * len(question) + (1,) * len(answer))
        before = prompt.messages or (Message("user", prompt.text),)
        whole = renderer.conversation((*before, *said), prompt.tools)
    except DataError as error:
        named = prompt.uid in str(error)
        raise DataError(str(error) if named else f"the demonstration of prompt {prompt.uid}: {error}") from error
    if not any(whole.answer_mask[1:]):
        raise DataError(f"the demonstration of prompt {prompt.uid} has no word of an assistant; give an answer")
    return TrainingSample(whole.token_ids, whole.answer_mask)
