"""The algorithms by name: the modules of `policies`, and those of others by `module:attribute`.

Torch-free until an algorithm is asked for; its module alone is imported then.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from gspo_moe.algorithms.spec import Algorithm
from gspo_moe.errors import ConfigError
from gspo_moe.external import import_own

FOLDER = Path(__file__).parent / "policies"


def algorithm_names() -> tuple[str, ...]:
    """Every algorithm of this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)])))


@cache
def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name; `my_module:MySpec` and `file.py:MySpec` are one's own.

    Raises ConfigError for an unknown name, a module that cannot be imported, and an attribute that is no `Algorithm`.
    """
    if ":" in name:
        return _external(name)
    known = algorithm_names()
    if name not in known:
        (nearest,) = get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown algorithm {name!r}; did you mean {nearest!r}? Known are {', '.join(known)}, or my_module:MySpec "
            "for one of your own"
        )
    spec: Algorithm = importlib.import_module(f"gspo_moe.algorithms.policies.{name}").SPEC
    return spec


def _external(name: str) -> Algorithm:
    spec = import_own(name, "algorithm.name")
    if not isinstance(spec, Algorithm):
        raise ConfigError(
            f"algorithm.name={name} is of type {type(spec).__name__}; make it a gspo_moe.algorithms.Algorithm(...), as "
            "examples/my_algorithm.py does"
        )
    return spec
