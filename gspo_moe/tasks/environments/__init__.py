"""Environments by name: tools that come with the program, and classes of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError, GspoMoeError
from gspo_moe.external import import_own
from gspo_moe.tasks.protocol import Environment, Task
from gspo_moe.types import OrderedPrompts, Prompt, Prompts

KEY = "task.environment"
NAMES = ("calculator", "python")


@dataclass(frozen=True)
class WithTools:
    """A task's prompts, each with the tools that the environment offers."""

    prompts: Prompts
    tools: tuple[dict[str, Any], ...]

    def prompt(self, split: str, index: int) -> Prompt:
        return replace(self.prompts.prompt(split, index), tools=self.tools)

    def size(self, split: str) -> int | None:
        return self.prompts.size(split)


@dataclass(frozen=True)
class OrderedWithTools(WithTools):
    """The same of prompts in an order of their own."""

    prompts: OrderedPrompts

    def at(self, split: str, place: int) -> tuple[int, int]:
        return self.prompts.at(split, place)

    def where(self, split: str, index: int) -> str:
        return self.prompts.where(split, index)

    def skipped(self, split: str) -> Sequence[str]:
        return self.prompts.skipped(split)

    def kept(self, split: str, indices: Sequence[int]) -> OrderedWithTools:
        return replace(self, prompts=self.prompts.kept(split, indices))


def _with_tools(prompts: Prompts, tools: tuple[dict[str, Any], ...]) -> Prompts:
    return OrderedWithTools(prompts, tools) if isinstance(prompts, OrderedPrompts) else WithTools(prompts, tools)


def in_environment(task: Task, config: TaskConfig) -> Task:
    """The task with the environment that `config.environment` names in place of its own, and its tools in the prompts.

    Raises ConfigError as `make_environment`.
    """
    if config.environment.name is None:
        if config.environment.options:
            raise ConfigError(f"{KEY}.options are given without {KEY}.name; name the environment that they are for")
        return task
    environment = make_environment(config)
    tools = tuple(getattr(environment, "tools", ()))
    return replace(task, environment=environment, prompts=_with_tools(task.prompts, tools) if tools else task.prompts)


def make_environment(config: TaskConfig) -> Environment:
    """The environment that `config.environment` names.

    Raises ConfigError for an unknown name, for options that do not fit, and for one that may take longer for a turn
    than `task.reward.timeout_seconds`.
    """
    name, options = config.environment.name, config.environment.options
    assert name is not None
    if ":" in name:
        return _own(name, options)
    if name == "calculator":
        from gspo_moe.tasks.environments.calculator import calculator

        return calculator(options)
    if name == "python":
        from gspo_moe.tasks.environments.python import python

        environment = python(options)
        if environment.seconds >= config.reward.timeout_seconds:
            raise ConfigError(
                f"{KEY}.options.total_seconds={environment.seconds:g} is not below task.reward.timeout_seconds="
                f"{config.reward.timeout_seconds:g}, so that slow programs would count as a broken environment; lower "
                "the one or raise the other"
            )
        return environment
    nearest = get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{KEY}.name={name} is unknown; the nearest is {nearest}; known are {', '.join(NAMES)}, and "
        "path/to/file.py:Environment for one of your own"
    )


def _own(name: str, options: dict[str, Any]) -> Environment:
    make = import_own(name, f"{KEY}.name")
    try:
        environment = make(**options)
    except GspoMoeError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{KEY}.name={name} with {KEY}.options={options} failed ({type(error).__name__}: {error}); correct the "
            "options, or the file"
        ) from error
    missing = [method for method in ("reset", "step") if not callable(getattr(environment, method, None))]
    if missing:
        raise ConfigError(
            f"{KEY}.name={name} gave a {type(environment).__name__} without {' and '.join(missing)}; an environment "
            "has reset(prompt) and step(prompt, turns)"
        )
    found: Environment = environment
    return found
