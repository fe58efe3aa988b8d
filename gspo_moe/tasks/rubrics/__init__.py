"""Rewards by name: a registry of common ones, functions of the user's own, and sums of them.

What a name needs is imported where it is used: reward workers must start fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.tasks.protocol import Rubric
from gspo_moe.tasks.rewards import TOTALS
from gspo_moe.tasks.rubrics.combined import ByPrompt, Term, WeightedSum
from gspo_moe.tasks.rubrics.own import own_rubric

TASKS_OWN = "task"
KEY = "task.reward"


def _registered(name: str) -> Callable[[Mapping[str, Any]], Rubric]:
    def make(options: Mapping[str, Any]) -> Rubric:
        module, _, attribute = name.partition(":")
        return getattr(importlib.import_module(f"gspo_moe.tasks.rubrics.{module}"), attribute)(options)

    return make


REGISTRY: dict[str, Callable[[Mapping[str, Any]], Rubric]] = {
    "math": _registered("math_answer:MathAnswer"),
    "code": _registered("code:Code"),
    "exact": _registered("exact:Exact"),
    "format": _registered("format:Format"),
    "length": _registered("length:Length"),
}


def task_rubric(config: TaskConfig, own: Rubric) -> Rubric:
    """The rubric of a task whose own is `own`: `task.reward` in its place, and for prompts of a file that file's.

    Raises ConfigError for an unknown name, and for options that do not fit.
    """
    rubric = make_rubric(config.reward, own) if config.reward.is_given else own
    named = dict[str, Rubric]()
    for split in ("train", "eval", "sft") if config.data is not None else ():
        for number, file in enumerate(getattr(config.data, split)):
            if file.reward is not None and file.reward not in named:
                named[file.reward] = _rubric(file.reward, {}, own, f"task.data.{split}[{number}].reward")
    return ByPrompt(rubric, named) if named else rubric


def make_rubric(config: RewardConfig, own: Rubric | None) -> Rubric:
    """The rubric that `config` names; own: the task's, which the name `task` stands for. Raises as `task_rubric`."""
    if config.name is not None:
        return _rubric(config.name, config.options, own, KEY)
    rubrics = [_rubric(term.name, term.options, own, f"{KEY}.sum[{number}]") for number, term in enumerate(config.sum)]
    names = _part_names(term.name for term in config.sum)
    return WeightedSum([Term(*one) for one in zip(names, rubrics, (term.weight for term in config.sum), strict=True)])


def _rubric(name: str, options: Mapping[str, Any], own: Rubric | None, key: str) -> Rubric:
    if name == TASKS_OWN:
        if own is None or options:
            fault = f"{key}.options={dict(options)} are for none; leave them out" if own else f"{key}={name} has none"
            raise ConfigError(f"{fault}: {name} is the task's own reward")
        return own
    if name in REGISTRY:
        try:
            return REGISTRY[name](options)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{KEY}.options", f"{key}.options")) from None
    if ":" in name:
        return own_rubric(name, options, key)
    known = [*REGISTRY, TASKS_OWN]
    if name.endswith(".py"):
        raise ConfigError(f"{key}={name} names a file and no function; write {name}:function")
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{key}={name} is unknown; the nearest is {nearest}; known are {', '.join(known)}, and "
        "path/to/my_reward.py:function or my_module:function for one of your own"
    )


def _part_names(names: Iterable[str]) -> list[str]:
    """A term's name in the log: a function's own, with its file's where it would be the total; alike ones numbered."""
    found: list[str] = []
    for name in names:
        where, _, function = name.rpartition(":")
        stem = PurePath(where).stem if where.endswith(".py") else where.rpartition(".")[2]
        label = f"{stem}.{function}" if where and function in (*TOTALS, "compute_score") else function
        same = sum(one.partition("_#")[0] == label for one in found)
        found.append(f"{label}_#{same + 1}" if same else label)
    return [one.replace("_#", "_") for one in found]
