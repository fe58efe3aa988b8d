"""The algorithms by name: the modules of `policies`, and those of others by `module:attribute`.

Torch-free until an algorithm is asked for; its module alone is imported then.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from gspo_moe.algorithms.spec import Algorithm
from gspo_moe.errors import ConfigError

FOLDER = Path(__file__).parent / "policies"


def algorithm_names() -> tuple[str, ...]:
    """Every algorithm of this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)])))


@cache
def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name; `my_module:MySpec` is `MySpec` of a module on the path or in the working folder.

    Raises ConfigError for an unknown name, a module that cannot be imported, and an attribute that is no `Algorithm`.
    """
    if ":" in name:
        return _external(*name.split(":", 1))
    known = algorithm_names()
    if name not in known:
        (nearest,) = get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown algorithm {name!r}; did you mean {nearest!r}? Known are {', '.join(known)}, or my_module:MySpec "
            "for one of your own"
        )
    spec: Algorithm = importlib.import_module(f"gspo_moe.algorithms.policies.{name}").SPEC
    return spec


def _external(module_name: str, attribute: str) -> Algorithm:
    given = f"algorithm {module_name}:{attribute}"
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{given} is not of the form my_module:MySpec; name a module and its Algorithm")
    # The command's own folder is on the path in place of the one that it was started in.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{given}: importing {module_name} failed ({type(error).__name__}: {error}); mend the module, or put it "
            "into the working folder or a folder of PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        found = [name for name, value in vars(module).items() if isinstance(value, Algorithm)]
        raise ConfigError(
            f"{given}: {module.__file__} has no {attribute}; "
            + (f"it has {', '.join(found)}" if found else "define it")
        )
    spec = getattr(module, attribute)
    if not isinstance(spec, Algorithm):
        raise ConfigError(
            f"{given} is of type {type(spec).__name__}; make it a gspo_moe.algorithms.Algorithm(...), as "
            "examples/my_algorithm.py does"
        )
    return spec
