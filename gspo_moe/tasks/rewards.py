"""What a task's own code gives for a conversation, checked: a reward, or the environment's next turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Conversation, Prompt, Reward

LARGEST_REWARD = 1e6  # beyond it squares and sums of rewards leave float32, and advantages their precision
TOTAL = "reward"


@dataclass(frozen=True)
class Step:
    """What the environment says; `text` is None where it says nothing, or failed.

    error, timed_out: as `types.Reward`.
    """

    text: str | None
    error: str | None = None
    timed_out: bool = False


def give_reward(task: Task, prompt: Prompt, turns: Conversation) -> Reward | str:
    """The rubric's reward, or what is wrong with what it gave."""
    given = task.rubric.reward(prompt, turns)
    parts = given if isinstance(given, Mapping) else {TOTAL: given}
    for name, value in parts.items():
        if not isinstance(value, Real) or not abs(value) <= LARGEST_REWARD:
            part = "" if parts is not given else f" as {name!r}"
            return f"reward gave {value!r}{part}, which is no number from {-LARGEST_REWARD:.0f} to {LARGEST_REWARD:.0f}"
    if not parts or not all(isinstance(name, str) for name in parts):
        return f"reward gave {given!r}; give a number, or at least one part by its name"
    numbers = {name: float(value) for name, value in parts.items()}
    total = numbers.pop(TOTAL) if TOTAL in numbers else sum(numbers.values())
    if not abs(total) <= LARGEST_REWARD:
        return f"reward gave parts with the sum {total:g}, which is beyond {LARGEST_REWARD:.0f} in size"
    return Reward(total, numbers)


def take_step(task: Task, prompt: Prompt, turns: Conversation) -> Step | str:
    """The environment's next turn, its first where there are no turns, or what is wrong with what it gave."""
    said = task.environment.step(prompt, turns) if turns else task.environment.reset(prompt)
    given = f"{'step' if turns else 'reset'} gave {said!r}, which"
    if said is None:
        return Step(None)
    if not isinstance(said, str):
        return f"{given} is neither text nor None"
    try:
        said.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{given} no tokenizer takes ({error.reason})"
    return Step(said)


def part_means(rewards: Iterable[Reward]) -> dict[str, float]:
    """Of each named part its mean over the rewards that have it, by name in order."""
    values: dict[str, list[float]] = {}
    for reward in rewards:
        for name, value in reward.parts.items():
            values.setdefault(name, []).append(value)
    return {name: sum(values[name]) / len(values[name]) for name in sorted(values)}
