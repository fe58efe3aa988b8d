"""Verifiable tasks: prompts, an environment for tasks of several turns, and a rubric that gives rewards.

`gspo_moe.tasks.pool` runs environments and rubrics in worker processes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from difflib import get_close_matches

from gspo_moe.config.task import FROM_FILES, TaskConfig
from gspo_moe.errors import ConfigError, GspoMoeError
from gspo_moe.external import import_own
from gspo_moe.tasks.environments import in_environment
from gspo_moe.tasks.files import data_task
from gspo_moe.tasks.protocol import Task
from gspo_moe.tasks.rubrics import task_rubric
from gspo_moe.tasks.skip_counting import SkipCounting, skip_counting
from gspo_moe.tasks.sort_letters import SortLetters, sort_letters

REASONING_GYM = "reasoning_gym/"


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config.name` names, with `config.options`; `seed` moves all of its random streams.

    `task.reward`, where it names one, takes the place of the task's own rewards, and `task.environment` of its own
    environment.
    `my_module:my_task` is a function (options, seed) -> Task of the user's own, imported in every process.
    Raises ConfigError for an unknown name, an unknown option or a value that does not fit.
    """
    if "code" in _rewards(config):
        from gspo_moe.tasks.rubrics.code import refuse_longer_programs

        refuse_longer_programs(config)
    task = _named(config, seed)
    return in_environment(replace(task, rubric=task_rubric(config, task.rubric)), config)


def _rewards(config: TaskConfig) -> set[str | None]:
    """The names of all rewards in the section."""
    files = () if config.data is None else (*config.data.train, *config.data.eval, *config.data.sft)
    return {config.reward.name, *(term.name for term in config.reward.sum), *(file.reward for file in files)}


def _named(config: TaskConfig, seed: int) -> Task:
    if ":" in config.name:
        return _external(config, seed)
    if config.name == SortLetters.name:
        return sort_letters(config.options, seed)
    if config.name == SkipCounting.name:
        return skip_counting(config.options, seed)
    if config.name.startswith(REASONING_GYM):
        # Here, not above: importing reasoning_gym takes seconds, and most tasks do without.
        from gspo_moe.tasks.reasoning_gym_task import reasoning_gym_task

        return reasoning_gym_task(config.name.removeprefix(REASONING_GYM), config.options, seed)
    if config.name == FROM_FILES:
        return data_task(config, seed)
    raise ConfigError(_unknown(config.name))


def _external(config: TaskConfig, seed: int) -> Task:
    make = import_own(config.name, "task.name")
    try:
        task = make(config.options, seed)
    except GspoMoeError:
        raise
    except Exception as error:
        raise ConfigError(
            f"task.name={config.name} with task.options={config.options} failed ({type(error).__name__}: {error}); "
            "correct the options, or the module"
        ) from error
    if not isinstance(task, Task):
        raise ConfigError(
            f"task.name={config.name} gave a {type(task).__name__}; let it return a gspo_moe.tasks.protocol.Task"
        )
    return task


def _unknown(name: str) -> str:
    known = [SortLetters.name, SkipCounting.name]
    if importlib.util.find_spec("reasoning_gym") is not None:
        from gspo_moe.tasks.reasoning_gym_task import DATASETS

        known += [REASONING_GYM + dataset for dataset in DATASETS]
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return (
        f"task.name={name} is unknown; the nearest is {nearest}; "
        f"known are {SortLetters.name}, {SkipCounting.name}, {REASONING_GYM}<data set>, {FROM_FILES} for files of "
        "prompts (task.data), and my_module:my_task for one of your own"
    )
