"""Work for benchmarks whose size does not depend on what a model says: random prompts, random rewards, no end token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gspo_moe.tasks.rewards import RewardBatch, RewardPool
from gspo_moe.types import Prompt

if TYPE_CHECKING:
    from gspo_moe.training.session import Plan, Session


@dataclass(frozen=True)
class Numbers:
    """A tokenizer whose words are the token ids themselves, written as numbers; none of them ends an answer."""

    vocab_size: int
    eos_id: int = 0
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

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

    def demonstration(self, prompt: Prompt) -> str:
        raise NotImplementedError("random prompts have no right answers")

    def score(self, prompt: Prompt, answer: str) -> float:
        """A number from 0 to 1 that prompt and answer decide."""
        return random.Random(f"{prompt.uid}/{answer}").random()


class RandomRewards(RewardPool):
    """`RandomPrompts.score` without worker processes."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> RewardBatch:
        task = RandomPrompts(1, 1)
        return RewardBatch(tuple(task.score(prompt, answer) for prompt, answer in items), 0, 0, None)


def open_synthetic_session(plan: Plan, prompt_tokens: int) -> Session:
    """A session on prompts of that many random words, whatever task and tokenizer the plan has. Collective."""
    from gspo_moe.training.session import open_session

    vocab = plan.architecture.vocab_size
    tokenizer: Any = Numbers(vocab)
    session = open_session(replace(plan, tokenizer=tokenizer, task=RandomPrompts(prompt_tokens, vocab)))
    session.close()
    session.answerer = replace(session.answerer, rewards=RandomRewards(plan.config.task, plan.config.seed))
    return session
