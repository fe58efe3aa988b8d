"""What a task is to the rest of the program: prompts, an environment that answers the policy, and rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gspo_moe.errors import ConfigError
from gspo_moe.types import Conversation, Message, Prompt, Prompts

Item = tuple[Prompt, Conversation]


class Environment(Protocol):
    """The other side of a conversation. All it knows is what it is given, so that any process can take the next step.

    Both methods run in the worker processes of `tasks.pool`; where one raises or hangs, the conversation ends in error.
    """

    def reset(self, prompt: Prompt) -> str | None:
        """What it says behind the prompt and before the first answer; None for nothing."""
        ...

    def step(self, prompt: Prompt, turns: Conversation) -> str | None:
        """What it says to the policy's turn, the last of `turns`; None where the conversation has ended."""
        ...


class Rubric(Protocol):
    """Runs in the worker processes of `tasks.pool`; one that raises or hangs gives `task.reward.failure_reward`."""

    def reward(self, prompt: Prompt, turns: Conversation) -> float | Mapping[str, float]:
        """The reward of a whole conversation: a number, normally 0 (wrong) to 1 (right), or its parts by name.

        The reward is the parts' sum, unless one of them is called "reward", or "score": then that is, and the others
        are only logged. Every number must be at most `tasks.rewards.LARGEST_REWARD` in size, the reward at most
        `task.reward.largest`.
        """
        ...


class BatchRubric(Rubric, Protocol):
    """A rubric that would rather see many conversations at once, those of one prompt together.

    Two more methods are optional in any rubric: `check(prompt)` raises ConfigError, before a run starts, where it
    cannot reward answers to that prompt; `prepare()` loads what it needs in a worker, outside of any time limit.
    """

    def rewards(self, items: Sequence[Item]) -> Sequence[float | Mapping[str, float]]:
        """Of each conversation its reward, in order; where this raises, they are done again one by one by `reward`."""
        ...


class SingleTurn:
    """The environment of tasks with one answer: it never says anything."""

    def reset(self, prompt: Prompt) -> None:
        return None

    def step(self, prompt: Prompt, turns: Conversation) -> None:
        return None


SINGLE_TURN = SingleTurn()


@dataclass(frozen=True)
class Task:
    """demonstrate: gives an answer to learn in supervised training, or the messages that follow the prompt, the first
    and the last of which are an assistant's; None where the task has none.

    No prompt that the split eval can give should ever be given by the others (see `tasks.splits`).
    """

    name: str
    prompts: Prompts
    rubric: Rubric
    environment: Environment = SINGLE_TURN
    demonstrate: Callable[[Prompt], str | tuple[Message, ...]] | None = None

    @property
    def single_turn(self) -> bool:
        return isinstance(self.environment, SingleTurn)

    def demonstration(self, prompt: Prompt) -> str | tuple[Message, ...]:
        """What to learn, as text or messages. Raises ConfigError where the task has none (stage sft)."""
        if self.demonstrate is None:
            raise ConfigError(f"task.name={self.name} has no demonstrations, so stage sft cannot use it; change one")
        return self.demonstrate(prompt)


def last_answer(turns: Conversation) -> str:
    """The policy's last turn; empty where it has had none."""
    return next((turn.text for turn in reversed(turns) if turn.role == "policy"), "")
