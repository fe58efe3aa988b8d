"""Objects of the user's own, by name: from a module on the path or in the working folder, or from a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gspo_moe.errors import ConfigError


def import_own(name: str, key: str) -> Any:
    """What `my_module:attribute`, or `path/to/file.py:attribute`, names; a file's folder joins the path.

    key: what the config calls it, for messages. Raises ConfigError for what is not of that form or not there, and for
    a module that fails, whatever it raises.
    """
    where, _, attribute = name.rpartition(":")
    given = f"{key}={name}"
    if not where or not attribute.isidentifier():
        raise ConfigError(f"{given} is not of the form my_module:name or path/to/file.py:name; name both")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _from_path(where)
    except (Exception, SystemExit) as error:  # of a module that may do anything
        raise ConfigError(
            f"{given}: importing {where} failed ({type(error).__name__}: {error}); mend it, or put it into the working "
            "folder or a folder of PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        own = [name for name, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__]
        found = f"it has {', '.join(own)}" if own else "define it"
        raise ConfigError(f"{given}: {module.__file__} has no {attribute}; {found}")
    return getattr(module, attribute)


def _from_path(name: str) -> ModuleType:
    # The command's own folder is on the path in place of the one that it was started in.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _from_file(file: Path) -> ModuleType:
    """The module of a file, once a process; by a name of its own, as two files may be called alike."""
    file = file.resolve(strict=True)
    name = f"{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:  # for what lies beside it
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
