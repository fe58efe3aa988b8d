"""Work for benchmarks whose size does not depend on what a model says: random prompts, random rewards, no end token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gspo_moe.data.rendering import Renderer
from gspo_moe.tasks.pool import Item, Over, TaskPool
from gspo_moe.tasks.protocol import Task
from gspo_moe.tasks.rewards import Reward
from gspo_moe.types import Conversation, Prompt

if TYPE_CHECKING:
    from gspo_moe.training.session import Plan, Session


@dataclass(frozen=True)
class Numbers:
    """A tokenizer whose words are the token ids themselves, written as numbers; none of them ends an answer."""

    vocab_size: int
    eos_id: int = 0
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    chat_template: None = None
    special: None = None

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class RandomPrompts:
    """Prompts of `length` words from a vocabulary of `vocab_size`, each from a generator of its own."""

    length: int
    vocab_size: int
    name: str = "random"

    def prompt(self, split: str, index: int) -> Prompt:
        words = random.Random(f"{split}/{index}").choices(range(self.vocab_size), k=self.length)
        return Prompt(f"{split}/{index}", " ".join(map(str, words)), self.name)

    def size(self, split: str) -> None:
        return None

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        """A number from 0 to 1 that prompt and answer decide."""
        return random.Random(f"{prompt.uid}/{turns[-1].text}").random()


class RandomRewards(TaskPool):
    """`RandomPrompts.reward` without worker processes."""

    def begin(self, prompts: Sequence[Prompt]) -> Over:
        return lambda index, turns: None

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        task = RandomPrompts(1, 1)
        return [Reward(task.reward(prompt, turns)) for prompt, turns in items]


def open_synthetic_session(plan: Plan, prompt_tokens: int) -> Session:
    """A session on prompts of that many random words, whatever task and tokenizer the plan has. Collective."""
    from gspo_moe.training.session import open_session

    vocab = plan.architecture.vocab_size
    tokenizer: Any = Numbers(vocab)
    prompts = RandomPrompts(prompt_tokens, vocab)
    task = Task(prompts.name, prompts=prompts, rubric=prompts)
    session = open_session(replace(plan, renderer=Renderer(tokenizer), task=task))
    session.close()
    session.answerer = replace(session.answerer, pool=RandomRewards(plan.config.task, plan.config.seed))
    return session
