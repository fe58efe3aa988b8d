"""Prompts of the user's own: files of records, formats of public data sets, mixtures and their order."""

from __future__ import annotations

from gspo_moe.config.task import TaskConfig
from gspo_moe.errors import ConfigError
from gspo_moe.tasks.files.prompts import FilePrompts
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Conversation, Prompt

UNREWARDED = (
    "nothing rewards the answers to the prompts of task.data; set task.reward, for example to math, exact or "
    "path/to/my_reward.py:function"
)


class Unrewarded:
    """The rubric of prompts for which the config names no reward."""

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        raise ConfigError(UNREWARDED)


def data_task(config: TaskConfig, seed: int) -> Task:
    """The task of `config.data`, whose files are read when a prompt is first asked for."""
    assert config.data is not None
    prompts = FilePrompts(config.data, seed)
    return Task(config.name, prompts=prompts, rubric=Unrewarded(), demonstrate=prompts.demonstration)
