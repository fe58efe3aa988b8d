"""What a task's own code gives for a conversation, checked: a reward, or the environment's next turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from gspo_moe.errors import RewardError
from gspo_moe.tasks.protocol import Item, Rubric, Task
from gspo_moe.types import Conversation, Prompt, Prompts, Reward

LARGEST_REWARD = 1e6  # beyond it squares and sums of rewards leave float32, and advantages their precision
CHECKED = 1000
LONGEST_SHOWN = 200  # characters
TOTALS = ("reward", "score")  # the part that is the reward; the latter is verl's name for it


@dataclass(frozen=True)
class Step:
    """What the environment says; `text` is None where it says nothing, or failed.

    error, timed_out: as `types.Reward`.
    """

    text: str | None
    error: str | None = None
    timed_out: bool = False


def as_reward(given: object) -> Reward | str:
    """What a rubric gave as a reward, or what is wrong with it.

    Where a part is the reward itself, text among the others (verl's `pred`) is no figure and is left out.
    """
    parts = given if isinstance(given, Mapping) else {TOTALS[0]: given}
    total_name = next((name for name in TOTALS if name in parts), None)
    numbers = dict[str, float]()
    for name, value in parts.items():
        if isinstance(value, str | None) and total_name not in (None, name):
            continue
        number = _number(value)
        is_number = isinstance(number, Real)
        if not is_number or not abs(number) <= LARGEST_REWARD:
            part = "" if parts is not given else f" as {name!r}"
            least, most = f"{-LARGEST_REWARD:.0f}", f"{LARGEST_REWARD:.0f}"
            return f"reward gave {shown(value)}{part}, which is no number from {least} to {most}"
        numbers[str(name)] = float(number)
    if not parts or not all(isinstance(name, str) for name in parts):
        return f"reward gave {shown(given)}; give a number, or at least one part by its name"
    total = sum(numbers.values()) if total_name is None else numbers.pop(total_name)
    if not abs(total) <= LARGEST_REWARD:
        return f"reward gave parts with the sum {total:g}, which is beyond {LARGEST_REWARD:.0f} in size"
    return Reward(total, numbers)


def shown(value: object) -> str:
    """A value as a message can hold it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"an {type(value).__name__} of {value.bit_length()} bits" if isinstance(value, int) else str(type(value))
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]}...{text[-LONGEST_SHOWN // 2 :]}"


def _number(value: Any) -> Any:
    """The plain number in a scalar of NumPy or torch; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def give_reward(task: Task, prompt: Prompt, turns: Conversation) -> Reward | str:
    """The rubric's reward, or what is wrong with what it gave."""
    return as_reward(task.rubric.reward(prompt, turns))


def give_rewards(rubric: Rubric, items: Sequence[Item]) -> list[Reward | str]:
    """As `give_reward`, of all items in one call of a rubric that takes them so."""
    return [as_reward(given) for given in given_rewards(rubric, items)]


def given_rewards(rubric: Rubric, items: Sequence[Item]) -> list[Any]:
    """What the rubric gives each item, unchecked; in one call where it is batched.

    Raises RewardError where that call gives more or fewer than there are items.
    """
    rewards = getattr(rubric, "rewards", None)
    given = [rubric.reward(*item) for item in items] if rewards is None else list(rewards(items))
    if len(given) != len(items):
        what = f"{type(rubric).__name__}.rewards gave {len(given)} rewards for {len(items)} answers"
        raise RewardError(f"{what}; give one for each")
    return given


def is_batched(rubric: Rubric) -> bool:
    """Whether it takes many conversations in one call, as `protocol.BatchRubric`."""
    return getattr(rubric, "rewards", None) is not None


def check_rewards(rubric: Rubric, prompts: Prompts, split: str) -> None:
    """Raises ConfigError where the rubric cannot reward answers to these prompts; runs nothing of the user's.

    Of a split without end one prompt is looked at, as drawing one may take long; else the first `CHECKED`.
    """
    size = prompts.size(split)
    if hasattr(rubric, "check"):
        for index in range(1 if size is None else min(size, CHECKED)):
            check_reward(rubric, prompts.prompt(split, index))


def check_reward(rubric: Rubric, prompt: Prompt) -> None:
    """As `check_rewards`, for one prompt."""
    check = getattr(rubric, "check", None)
    if check is not None:
        check(prompt)


def prepare(rubric: Rubric) -> None:
    """Loads what the rubric needs, so that it is no part of the first reward's time."""
    load = getattr(rubric, "prepare", None)
    if load is not None:
        load()


def take_step(task: Task, prompt: Prompt, turns: Conversation) -> Step | str:
    """The environment's next turn, its first where there are no turns, or what is wrong with what it gave."""
    said = task.environment.step(prompt, turns) if turns else task.environment.reset(prompt)
    given = f"{'step' if turns else 'reset'} gave {shown(said)}, which"
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
