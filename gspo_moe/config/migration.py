"""Old spellings of a config that are still read. Torch-free until an algorithm is asked for.

`algorithm.NAME: {...}`, with the name of an algorithm, are that algorithm's options; runs of another algorithm wrote
them too, with their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo_moe.algorithms.table import algorithm_names, find_algorithm
from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a config in the spelling of `schema`; raises ConfigError for options of another algorithm."""
    section = values.get("algorithm")
    if not isinstance(section, Mapping):
        return dict(values)
    name = section.get("name", AlgorithmConfig.model_fields["name"].default)
    kept = {key: value for key, value in section.items() if key not in algorithm_names()}
    for key in section.keys() - kept.keys():
        options, given = find_algorithm(key).options, section[key]
        if options is None or not isinstance(given, Mapping):
            kept[key] = given  # refused like any unknown key
            continue
        found = validated(options, given, prefix=f"algorithm.{key}.")
        if key == name:
            kept["options"] = _joined(key, given, kept.get("options") or {})
        elif found != options():
            raise ConfigError(
                f"algorithm.{key} belongs to algorithm.name={key}, and name is {name}; set algorithm.name={key} or "
                f"leave algorithm.{key} out"
            )
    return {**values, "algorithm": kept}


def _joined(name: str, old: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    for key in old.keys() & options.keys():
        if old[key] != options[key]:
            raise ConfigError(
                f"algorithm.{name}.{key}={old[key]!r} and algorithm.options.{key}={options[key]!r} are one key; "
                "keep the second"
            )
    return {**old, **options}
