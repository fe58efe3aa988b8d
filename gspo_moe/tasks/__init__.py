"""Verifiable tasks: endless procedural prompts, each with a function that scores an answer.

`gspo_moe.tasks.rewards` runs those functions in worker processes.
"""

from __future__ import annotations

import importlib.util
from difflib import get_close_matches

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.tasks.protocol import Task
from gspo_moe.tasks.sort_letters import SortLetters

REASONING_GYM = "reasoning_gym/"


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config.name` names, with `config.options`; `seed` moves all of its random streams.

    Raises ConfigError for an unknown name, an unknown option or a value that does not fit.
    """
    if config.name == SortLetters.name:
        return SortLetters(config.options, seed)
    if config.name.startswith(REASONING_GYM):
        # Here, not above: importing reasoning_gym takes seconds, and most tasks do without.
        from gspo_moe.tasks.reasoning_gym_task import ReasoningGymTask

        return ReasoningGymTask(config.name.removeprefix(REASONING_GYM), config.options, seed)
    raise ConfigError(_unknown(config.name))


def _unknown(name: str) -> str:
    known = [SortLetters.name]
    if importlib.util.find_spec("reasoning_gym") is not None:
        from gspo_moe.tasks.reasoning_gym_task import DATASETS

        known += [REASONING_GYM + dataset for dataset in DATASETS]
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return (
        f"task.name={name} is unknown; the nearest is {nearest}; "
        f"known are {SortLetters.name}, {REASONING_GYM}<data set>"
    )
