"""What stage sft learns: a prompt and a demonstration behind it as one sequence, checked before the run starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gspo_moe.config.schema import Config
from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Message, Prompt, Prompts, TrainingSample

SPLIT = "sft"
_log = logging.getLogger(__name__)


def as_text(said: str | Sequence[Message]) -> str:
    """For a person to read, and for a tokenizer to be trained on."""
    return said if isinstance(said, str) else "\n".join(f"{message.role}: {message.content}" for message in said)


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
            answer = [*renderer.tokenizer.encode(said), renderer.tokenizer.eos_id]
            return TrainingSample((*question, *answer), (0,) * len(question) + (1,) * len(answer))
        before = prompt.messages or (Message("user", prompt.text),)
        whole = renderer.conversation((*before, *said), prompt.tools)
    except DataError as error:
        named = prompt.uid in str(error)
        raise DataError(str(error) if named else f"the demonstration of prompt {prompt.uid}: {error}") from error
    if not any(whole.answer_mask[1:]):
        raise DataError(f"the demonstration of prompt {prompt.uid} has no word of an assistant; give an answer")
    return TrainingSample(whole.token_ids, whole.answer_mask)


def with_fitting_demonstrations(config: Config, task: Task, renderer: Renderer, positions: int) -> Task:
    """The task, without demonstrations longer than model or micro-batch where `rollout.long_prompts` drops them.

    Every one is read, but for a task without end, of which the first is. positions: of the model.
    Raises ConfigError, naming the longest, for one that is too long and not dropped, and where none is left; DataError
    as `training_sample`.
    """
    size = task.prompts.size(SPLIT)
    lengths = [_length(task, renderer, index) for index in range(1 if size is None else size)]
    room = min(positions, config.schedule.micro_batch_tokens)
    fitting = [index for index, length in enumerate(lengths) if length <= room]
    if len(fitting) == len(lengths):
        return task
    limit = f"the model's {positions} positions" if room == positions else f"schedule.micro_batch_tokens={room}"
    if config.rollout.long_prompts != "drop" or size is None:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        fix = "" if room == positions else f"raise that to {min(max(lengths), positions)}, "
        raise ConfigError(
            f"{len(lengths) - len(fitting)} of {len(lengths)} demonstrations have more tokens than {limit}, the "
            f"longest {lengths[longest]} (prompt {task.prompts.prompt(SPLIT, longest).uid}); {fix}shorten them, or "
            "leave them out with rollout.long_prompts=drop"
        )
    if not fitting:
        raise ConfigError(f"every demonstration has more tokens than {limit}; shorten them, or raise that")
    if int(os.environ.get("RANK", "0")) == 0:
        count = len(lengths) - len(fitting)
        _log.warning("%d of %d demonstrations are left out: they have more tokens than %s", count, len(lengths), limit)
    return replace(task, prompts=_Chosen(task.prompts, tuple(fitting)))


def _length(task: Task, renderer: Renderer, index: int) -> int:
    """In positions: the last token is only predicted."""
    prompt = task.prompts.prompt(SPLIT, index)
    return len(training_sample(renderer, prompt, task.demonstration(prompt)).token_ids) - 1


@dataclass(frozen=True)
class _Chosen:
    """A task's prompts, those of the split sft by `indices` alone."""

    prompts: Prompts
    indices: tuple[int, ...]

    def prompt(self, split: str, index: int) -> Prompt:
        return self.prompts.prompt(split, self.indices[index] if split == SPLIT else index)

    def size(self, split: str) -> int | None:
        return len(self.indices) if split == SPLIT else self.prompts.size(split)
