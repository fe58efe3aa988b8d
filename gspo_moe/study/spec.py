"""What a study is: arms and seeds over one base config, from one cold start. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from gspo_moe.config.loading import as_override, read_values
from gspo_moe.config.validation import validated
from gspo_moe.section import Section


def flat(value: Any) -> Any:
    """Nested sections as dotted keys; where a key stands in both forms the later one counts."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, inner in value.items():
        inside = flat(inner)
        if isinstance(inside, dict) and inside:
            found |= {f"{key}.{name}": setting for name, setting in inside.items()}
        else:
            found[str(key)] = inside
    return found


Settings = Annotated[dict[str, Any], BeforeValidator(flat)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

COLD_START = "cold_start"
BANKS = "banks"


class ColdStart(Section):
    """The run, usually `stage: sft`, whose HF export every cell starts from; `each_seed`: one for each of the seeds."""

    base: str
    set: Settings = Field(default_factory=dict)
    each_seed: bool = False


class Online(Section):
    """Each arm makes its own rollouts and trains on them."""

    set: Settings = Field(default_factory=dict)


class Bank(Section):
    """Each arm takes `mini_batches` updates on rollouts of the cold start that are frozen once a seed.

    Arms share them but where their own settings of `rollout` or `task` differ.

    One RL step an arm and N; what differs is the objective alone.
    """

    mini_batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    set: Settings = Field(default_factory=dict)


class Study(Section):
    """Arms x seeds.

    base, cold_start.base: config files, relative to the study's own. set: dotted keys of the config with their values,
    as `optimizer.lr: 1e-4`; an arm's go before the mode's, the mode's before the study's. Without `cold_start` the base
    config names the model.
    seeds: the same prompts in the same order for each arm at equal seeds. baseline: what paired differences are taken
    to, the first arm unless given. processes: of each cell, under torchrun. cells_at_once: None for as many as the
    machine's CPUs or GPUs have room for.
    """

    name: Name
    base: str
    set: Settings = Field(default_factory=dict)
    cold_start: ColdStart | None = None
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    arms: Annotated[dict[Name, Settings], Field(min_length=1)]
    baseline: str | None = None
    online: Online | None = None
    bank: Bank | None = None
    processes: PositiveInt = 1
    cells_at_once: PositiveInt | None = None
    run_dir: str = "runs"

    @field_validator("arms", mode="before")
    @classmethod
    def _nothing_set(cls, value: Any) -> Any:
        return {name: settings or {} for name, settings in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _complete(self) -> Study:
        if self.online is None and self.bank is None:
            raise ValueError("a study needs `online: {}`, `bank: {}` or both; add one")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice; remove one")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline} is no arm; arms are {', '.join(self.arms)}")
        taken = {COLD_START, BANKS} & set(self.arms)
        if taken:
            raise ValueError(f"arms may not be called {', '.join(sorted(taken))}; rename them")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) / self.name

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file with `key=value` overrides; raises ConfigError, one line for each wrong thing."""
    return validated(Study, read_values(path, overrides))


def settings_as_overrides(*settings: Settings) -> list[str]:
    """`section.key=value` overrides; later settings go before earlier ones."""
    merged: dict[str, Any] = {}
    for one in settings:
        merged |= one
    return [as_override(key, value) for key, value in merged.items()]
