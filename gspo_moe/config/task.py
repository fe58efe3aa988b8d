"""The section `task`: what is asked, and how answers are rewarded. Torch-free, and light: reward workers import it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from gspo_moe.config.data import DataConfig
from gspo_moe.section import Section

FROM_FILES = "data"  # the name of the task whose prompts are `task.data`


class RewardTerm(Section):
    """One term of a weighted sum; `name` and `options` as `RewardConfig` has them. A name alone stands for it."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class RewardConfig(Section):
    """Rewards run in worker processes; one that raises, hangs or exceeds `largest` is counted as `failure_reward`.

    name: of the registry (`math`, `code`, `exact`, ...), or `path/to/file.py:function`, `my_module:function`; null is
    the task's own. A name alone stands for the section.
    options: of the one that `name` names. sum: terms in place of a name; a list alone stands for the section.
    timeout_seconds: of one reward. batch_seconds: of all of a step's or an evaluation's together; null is no limit.
    start_seconds: until a worker, or the program itself before a run, has imported and made the task.
    memory_mb: MiB that a worker may have beyond what it holds then; null is no limit.
    output_kb: of what rewards print in a step or an evaluation, KiB that are shown.
    largest: the largest reward in size.
    allow_all_failed: goes on also where no answer of a step or an evaluation got a reward of its own.
    max_failed_batches: of prompts in a row without one, after which the run then ends.
    max_failure_rate: the largest share of a step's or an evaluation's rewards that may fail; a larger one ends the run.
    """

    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    sum: tuple[RewardTerm, ...] = ()
    workers: PositiveInt = 1
    timeout_seconds: PositiveFloat = 10.0
    batch_seconds: PositiveFloat | None = None
    start_seconds: Annotated[float, Field(gt=0.0, le=1e9)] = 300.0
    memory_mb: PositiveInt | None = 8192
    output_kb: PositiveInt = 16
    failure_reward: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    largest: Annotated[float, Field(gt=0.0, le=1e6)] = 1e6
    allow_all_failed: bool = False
    max_failed_batches: PositiveInt = 10
    max_failure_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0

    def faults(self) -> Iterator[str]:
        if self.name is not None and self.sum:
            yield f"task.reward.name={self.name} and task.reward.sum are both given; make the name a term of the sum"
        if self.name is None and self.options:
            yield "task.reward.options are given without task.reward.name; name the reward that they are for"
        if abs(self.failure_reward) > self.largest:
            yield (
                f"task.reward.failure_reward={self.failure_reward:g} is larger than task.reward.largest="
                f"{self.largest:g}; raise the one or bring the other nearer to 0"
            )
        if self.batch_seconds is not None and self.batch_seconds < self.timeout_seconds:
            yield (
                f"task.reward.batch_seconds={self.batch_seconds:g} is below task.reward.timeout_seconds="
                f"{self.timeout_seconds:g}, which one reward may take; raise the one or lower the other"
            )

    @property
    def is_given(self) -> bool:
        """Whether it takes the place of the task's own."""
        return self.name is not None or bool(self.sum)


class EnvironmentConfig(Section):
    """The other side of a conversation: `calculator`, `python`, or `path/to/file.py:Environment` of one's own.

    A name alone stands for the section; null is the task's own.
    """

    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class TaskConfig(Section):
    """name: `sort_letters`, `skip_counting`, `reasoning_gym/...`, `my_module:my_task`, or `data`, which `task.data`
    alone means too.
    """

    name: str = "sort_letters"
    options: dict[str, Any] = Field(default_factory=dict)
    data: DataConfig | None = None
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig = EnvironmentConfig()

    @model_validator(mode="before")
    @classmethod
    def _data_is_a_task(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("data") is not None and "name" not in values:
            return {**values, "name": FROM_FILES}
        return values

    @field_validator("reward", mode="before")
    @classmethod
    def _reward_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else {"sum": value} if isinstance(value, list) else value

    @field_validator("environment", mode="before")
    @classmethod
    def _environment_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def faults(self) -> Iterator[str]:
        if self.name == FROM_FILES and self.data is None:
            yield f"task.name={FROM_FILES} reads files, and task.data names none; set task.data.train to a file"
        if self.name != FROM_FILES and self.data is not None:
            yield f"task.name={self.name} does not read task.data; leave one of them out"
        if self.data is not None and self.options:
            yield "task.options are no part of a task of files; say what is read in task.data"
