"""Turns what pydantic finds into one ConfigError: a line each, naming key, value and fix. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gspo_moe.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)

LONGEST_VALUE = 60


def validated(schema: type[Schema], values: Mapping[str, Any], prefix: str = "") -> Schema:
    """Builds `schema` from plain values.

    prefix: what to print before each key, such as `model.overrides.`.
    Raises ConfigError with one line for each thing that is wrong.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_line(schema, detail, prefix) for detail in error.errors())) from None


def nearest_key(schema: type[BaseModel], dotted: str) -> str:
    """The valid key most like `dotted`: first by its last part, then as a whole."""
    name = dotted.rpartition(".")[2]
    return max(_keys(schema), key=lambda key: (_similarity(name, key.rpartition(".")[2]), _similarity(dotted, key)))


def _similarity(left: str, right: str) -> float:
    return SequenceMatcher(None, left, right).ratio()


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, f"{prefix}{name}.")


def _line(schema: type[BaseModel], detail: ErrorDetails, prefix: str) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    value, message = detail["input"], detail["msg"]
    key = f"{prefix}{dotted}={_short(value)}"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}; the nearest valid key is {prefix}{nearest_key(schema, dotted)}"
    if detail["type"] == "missing":
        return f"{prefix}{dotted} is missing; set it"
    if detail["type"] == "value_error":
        rule = str(detail["ctx"]["error"])
        about_section = isinstance(value, Mapping | BaseModel)
        if about_section and not prefix:
            return rule
        where = prefix.rstrip(".:") if about_section else key
        return "\n".join(f"{where}: {fault}" for fault in rule.split("\n"))
    if detail["type"] in ("model_type", "dict_type"):
        return f"{key}: expected a section, that is keys with values"
    if detail["type"] == "string_type":
        return f"{key}: expected text; put it in quotes"
    return f"{key}: expected {message.removeprefix('Input should be ')}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
