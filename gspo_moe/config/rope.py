"""Rotary embeddings as a `config.json` spells them: unscaled, or YaRN. Torch-free.

transformers 5 writes `rope_parameters`; transformers 4 writes `rope_theta` beside `rope_scaling`, whose kind is under
`rope_type`, in early versions under `type`. All of it is read; two spellings that differ are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError
from gspo_moe.section import Section

DEFAULT_THETA = 10_000.0  # what transformers takes for a config.json without one
SPELLINGS = ("rope_parameters", "rope_scaling")
# What may stand at the top of the file as well as inside.
_SHARED = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


class Yarn(Section):
    """YaRN (arXiv 2309.00071), as transformers 5 reads it; `model.rope` has the formulas.

    factor: how many times as many positions. original_max_position_embeddings: positions before.
    beta_fast, beta_slow: dimensions that turn more often than the first within the original positions keep their
    frequency, those that turn less often than the second are divided by `factor`. truncate: to whole dimensions.
    attention_factor: of cosines and sines; None for what `factor`, and `mscale` and `mscale_all_dim` if both, give.
    """

    rope_type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1.0, le=1e6)
    original_max_position_embeddings: Annotated[int, Field(gt=0, lt=1 << 31)]
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @field_validator("beta_fast", "beta_slow", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        # transformers takes null and 0 for the default here.
        return value or cls.model_fields[info.field_name].default

    @model_validator(mode="after")
    def _ramp_rises(self) -> Yarn:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}; leave both out")
        return self

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` that transformers 4 and 5 read."""
        return {"rope_type": self.rope_type, **self.model_dump(exclude_defaults=True)}


def read_rope(hf: Mapping[str, Any], file: Path) -> tuple[float, Yarn | None]:
    """RoPE's base and scaling, from the keys of a whole `config.json`.

    Raises ConfigError, naming the keys, for spellings that differ, kinds other than `default` and `yarn`, and
    parameters that the kind does not have.
    """
    rope = _merged(hf, file)
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta", DEFAULT_THETA)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{file}: partial_rotary_factor is not supported; RoPE must turn whole heads: 1.0")
    if kind == "default":
        if rope:
            raise ConfigError(
                f"{file}: {_keys(rope)} would scale RoPE, but rope_type is 'default'; give the rope_type (yarn), or "
                "remove the rest"
            )
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"{file}: rope_type={kind!r} is not supported; only default and yarn are")
    longest = hf.get("max_position_embeddings")
    original = rope.setdefault("original_max_position_embeddings", longest)
    # transformers reads a factor of null, but no missing one, as the ratio of the two lengths.
    spelled = [name for name in SPELLINGS if hf.get(name)]
    if "factor" not in rope and any("factor" in hf[name] for name in spelled):
        if type(longest) is not int or type(original) is not int or original < 1:
            raise ConfigError(
                f"{file}: max_position_embeddings={longest!r} and original_max_position_embeddings={original!r} are no "
                "two whole numbers, whose ratio a factor of null stands for; give the factor"
            )
        rope["factor"] = longest / original
    return theta, validated(Yarn, rope, prefix=f"{file}: {spelled[0]}.")


def _merged(hf: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """All that the file says of RoPE, without nulls, the kind under `rope_type`."""
    top = {name: hf[name] for name in _SHARED if hf.get(name) is not None}
    rope, found_in = dict(top), dict.fromkeys(top, "the file's top")
    read: dict[str, dict[str, Any]] = {}
    for spelling in SPELLINGS:
        if not hf.get(spelling):
            continue
        read[spelling] = _one_spelling(hf[spelling], spelling, file)
        for name, value in read[spelling].items():
            if name in rope and rope[name] != value:
                raise ConfigError(
                    f"{file}: {name} is {rope[name]!r} in {found_in[name]} and {value!r} in {spelling}; keep one"
                )
            rope[name], found_in[name] = value, spelling
    if len(read) == len(SPELLINGS):
        first, second = SPELLINGS
        only = [name for name in rope if (name in read[first]) != (name in read[second]) and name not in top]
        if only:
            raise ConfigError(
                f"{file}: {first}={hf[first]!r} and {second}={hf[second]!r} differ in {', '.join(only)}; keep one of "
                "them"
            )
    return rope


def _one_spelling(given: Any, spelling: str, file: Path) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{file}: {spelling}={given!r} must be a section, that is keys with values, or null")
    rope = {name: value for name, value in given.items() if value is not None}
    old = rope.pop("type", None)
    if old is not None and rope.setdefault("rope_type", old) != old:
        raise ConfigError(f"{file}: {spelling} has type={old!r} and rope_type={rope['rope_type']!r}; keep one")
    rope.setdefault("rope_type", "default")
    return rope


def _keys(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
