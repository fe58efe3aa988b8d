"""torch.compile's machinery (torch._dynamo), loaded when something of it is needed.

Optimizers and custom operators of torch import it in any run, for two things that mean nothing before it has traced
anything: `disable`, which keeps it off a function, and `graph_break`. Loading it takes a second.

Invariant: the module loads itself in place at the first use of anything else of it; from then on what it had been asked
to keep off is kept off.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

NAME = "torch._dynamo"
_lock = threading.RLock()


class _Dynamo(ModuleType):
    """torch._dynamo before it is loaded, with nothing but what these methods do."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" or not name.startswith("__"):
            _load(self)
            return getattr(self, name)
        raise AttributeError(name)


def _load(module: ModuleType) -> None:
    with _lock:
        if type(module) is not _Dynamo:  # another thread has
            return
        object.__setattr__(module, "__class__", ModuleType)
        for name in ASKED:
            delattr(module, name)
        spec = module.__spec__
        assert spec is not None
        assert isinstance(spec.loader, _Loader)
        vars(module)["__path__"] = spec.submodule_search_locations
        spec.loader.real.exec_module(module)


def _disable(fn: Callable[..., Any] | None = None, recursive: bool = True, **how: Any) -> Callable[..., Any]:
    """`torch._dynamo.disable`, asked for anew once there is something to keep off a function."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **how)
    if not inspect.isfunction(fn):  # a class, a module
        found = sys.modules[NAME]
        _load(found)
        return cast("Callable[..., Any]", found.disable(fn, recursive, **how))

    @functools.cache
    def disabled() -> Callable[..., Any]:
        found: Callable[..., Any] = sys.modules[NAME].disable(fn, recursive, **how)
        return found

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if type(sys.modules[NAME]) is _Dynamo:
            return fn(*args, **kwargs)
        return disabled()(*args, **kwargs)

    return call


def _graph_break(msg: str = "") -> None:
    """Ends a graph that is being traced, of which there is none."""


ASKED = {"disable": _disable, "graph_break": _graph_break}


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.machinery.SourceFileLoader) -> None:
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Dynamo
        vars(module).update(ASKED)
        del vars(module)["__path__"]  # so that the import of a module below loads this one first


class LazyDynamo(importlib.abc.MetaPathFinder):
    """Finds torch._dynamo alone; in sys.meta_path before the finder of paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader)
        return spec
