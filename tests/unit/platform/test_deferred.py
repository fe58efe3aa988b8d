"""Deferred names against the names themselves, in a package of the test's own."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gspo_moe.platform import deferred

HEAVY = """
class Base:
    kind = "base"
    def __init__(self, value=1):
        self.value = value

def double(number):
    return 2 * number
"""
IMPORTER = """
import torch
from heavy_package.inner import Base, double
from near import heavy_module
from os.path import join
"""


@pytest.fixture
def importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace of IMPORTER, executed where `heavy_package` and `near.heavy_module` are deferred."""
    for package in ("heavy_package", "near"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "heavy_package" / "inner.py").write_text(HEAVY)
    (tmp_path / "near" / "heavy_module.py").write_text("size = 3")
    monkeypatch.syspath_prepend(tmp_path)
    packages = {"heavy_package": "heavy_package", "near.heavy_module": "near.heavy_module"}
    monkeypatch.setattr(deferred, "PACKAGES", packages)
    return executed(IMPORTER, "importer")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("heavy_package", "heavy_package.inner", "near", "near.heavy_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def executed(source: str, name: str) -> dict[str, Any]:
    builtins = deferred.deferring_builtins(name, ModuleType("torch as the CPU has it"))
    names = {"__name__": name, "__package__": name.rpartition(".")[0], "__builtins__": builtins}
    exec(source, names)
    return names


def test_nothing_is_imported_by_an_import_nor_by_asking_for_instances(importer: dict[str, Any]) -> None:
    assert not isinstance(3, importer["Base"])
    assert not issubclass(int, importer["Base"])
    assert "heavy_package" not in sys.modules
    assert "near.heavy_module" not in sys.modules


def test_a_deferred_name_does_what_the_name_does(importer: dict[str, Any]) -> None:
    base: Any = importer["Base"]
    assert importer["double"](21) == 42
    assert base.kind == "base"
    assert base(5).value == 5
    assert importer["heavy_module"].size == 3
    real: Any = sys.modules["heavy_package.inner"]

    class Derived(base):
        pass

    assert Derived.__mro__ == (Derived, real.Base, object)
    assert isinstance(real.Base(), (int, base))
    assert not isinstance(3, base)
    assert issubclass(Derived, base)
    assert (base | None) == (real.Base | None)
    assert (int | base) == (int | real.Base)


def test_instances_made_by_another_importer_are_known(importer: dict[str, Any]) -> None:
    from heavy_package.inner import Base  # type: ignore[import-not-found]

    assert isinstance(Base(), importer["Base"])


def test_other_imports_and_the_package_itself_are_as_ever(importer: dict[str, Any]) -> None:
    assert importer["join"]("a", "b") == "a/b"
    assert importer["torch"].__name__ == "torch as the CPU has it"
    inside = executed("from heavy_package.inner import Base", "heavy_package.other")
    assert inside["Base"] is sys.modules["heavy_package.inner"].Base


def test_relative_imports_are_deferred_too(importer: dict[str, Any]) -> None:
    found = executed("from .heavy_module import size", "near.beside")["size"]
    assert "near.heavy_module" not in sys.modules
    assert found.real == 3
