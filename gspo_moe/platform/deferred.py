"""What megatron-core imports and a run without a GPU uses late or never, imported when it is first used.

Distributed tensors bring sympy, the builder of extensions brings setuptools, torch's optimizers ask torch.compile's
machinery for nothing: seconds before the first step.

Invariant: what is deferred does what the real thing would. Names of megatron-core's modules, and of no others, can be
called, subclassed, asked for attributes and for `isinstance`, each of which imports them, save for the last where their
package is not imported, so that it has no instances.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

# Packages whose names are deferred, with where those are defined.
PACKAGES = {
    "megatron.core.dist_checkpointing.strategies.torch": "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed.fsdp": "megatron.core.distributed.fsdp",
    "torch.distributed._tensor": "torch.distributed.tensor",
    "torch.distributed.checkpoint": "torch.distributed.checkpoint",
    "torch.distributed.fsdp": "torch.distributed.fsdp",
    "torch.distributed.tensor": "torch.distributed.tensor",
    "torch.utils.cpp_extension": "torch.utils.cpp_extension",
    "torch.utils.tensorboard": "torch.utils.tensorboard",
}


class DeferredName:
    """Stands for `name` of `module`, or the module of that name below it; a part of `package`."""

    def __init__(self, package: str, module: str, name: str) -> None:
        self._package, self._module, self._name = package, module, name

    @cached_property
    def _real(self) -> Any:
        found = importlib.import_module(self._module)
        if not hasattr(found, self._name):
            return importlib.import_module(f"{self._module}.{self._name}")
        return getattr(found, self._name)

    def _may_have_instances(self) -> bool:
        return self._package in sys.modules

    def __getattr__(self, name: str) -> Any:
        if name in ("_package", "_module", "_name", "_real"):  # of a copy that is being made, or a failed import
            raise AttributeError(name)
        return getattr(self._real, name)

    def __reduce__(self) -> Any:
        return getattr, (importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real(*args, **kwargs)

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real,)

    def __instancecheck__(self, instance: Any) -> bool:
        return self._may_have_instances() and isinstance(instance, self._real)

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._may_have_instances() and issubclass(subclass, self._real)

    def __or__(self, other: Any) -> Any:
        return self._real | other

    def __ror__(self, other: Any) -> Any:
        return other | self._real


class _DeferredModule(ModuleType):
    """What `from ... import` takes the names of a module from."""

    def __init__(self, package: str, module: str) -> None:
        super().__init__(module)
        self._package = package

    def __getattr__(self, name: str) -> DeferredName:
        if name.startswith("__"):  # which the import system asks for
            raise AttributeError(name)
        return DeferredName(self._package, self.__name__, name)


def deferring_builtins(importer: str, torch: ModuleType) -> dict[str, Any]:
    """`__builtins__` for the module `importer`, put in its namespace before it is executed.

    Its `import torch` gives `torch`; its `from ... import` of `PACKAGES`, unless it is a part of the same one, defers.
    """

    def import_(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if fromlist and globals is not None:
            module = importlib.util.resolve_name("." * level + name, globals["__package__"])
            package = _package_of(module)
            if package is not None and _package_of(importer) != package:
                return _DeferredModule(PACKAGES[package], module.replace(package, PACKAGES[package], 1))
            if all(f"{module}.{each}" in PACKAGES for each in fromlist):
                return _DeferredModule(f"{module}.{fromlist[0]}", module)
        elif name == "torch":
            return torch
        return builtins.__import__(name, globals, locals, fromlist or (), level)

    return {**vars(builtins), "__import__": import_}


def _package_of(module: str) -> str | None:
    """Which of `PACKAGES` a module is, or is a part of."""
    return next((package for package in PACKAGES if f"{module}.".startswith(f"{package}.")), None)
