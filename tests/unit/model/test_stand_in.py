"""The stand-in for Transformer Engine has the real one's signatures, read from its sources without importing them.

GSPO_MOE_TRANSFORMER_ENGINE names wheels, or folders that hold `transformer_engine/`, separated by colons; without it an
installed Transformer Engine is read, and without that the test skips. docs/gpu.md says how to get a wheel.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).parents[2] / "stand_in"
VARIABLE = "GSPO_MOE_TRANSFORMER_ENGINE"
MISSING = f"needs Transformer Engine's Python sources: set {VARIABLE} to a wheel of transformer-engine-cu13"
PLACES = (
    "transformer_engine.pytorch.Linear",
    "transformer_engine.pytorch.GroupedLinear",
    "transformer_engine.pytorch.RMSNorm",
    "transformer_engine.pytorch.DotProductAttention",
    "transformer_engine.pytorch.fp8.FP8GlobalStateManager",
)
# What megatron-core passes by place; all else goes by name.
BY_PLACE = {
    "Linear.forward": ("inp",),
    "GroupedLinear.forward": ("inp", "m_splits"),
    "DotProductAttention.forward": ("query_layer", "key_layer", "value_layer", "attention_mask"),
}


@dataclass(frozen=True)
class Signature:
    """names: parameters in order, without self; defaults: of those that have one, as source; more: takes **kwargs."""

    names: tuple[str, ...]
    defaults: dict[str, str]
    more: bool


def sources() -> list[Any]:
    """Folders, real or in a zip file, that hold `transformer_engine/`."""
    named = [Path(one) for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one]
    if named:
        return [zipfile.Path(one) if one.is_file() else one for one in named]
    specification = importlib.util.find_spec("transformer_engine")
    if specification is None or specification.origin is None:
        return []
    return [Path(specification.origin).parents[1]]


def module_file(root: Any, module: str) -> tuple[Any, str]:
    """A module's file, and the package that its relative imports start from."""
    path = root
    for part in module.split("."):
        path = path / part
    if (path / "__init__.py").exists():
        return path / "__init__.py", module
    return root.joinpath(*module.split(".")[:-1], module.split(".")[-1] + ".py"), module.rpartition(".")[0]


def find_class(root: Any, module: str, name: str) -> ast.ClassDef:
    """The definition that `from module import name` leads to. Raises LookupError where it leads nowhere."""
    file, package = module_file(root, module)
    if not file.exists():
        raise LookupError(f"there is no {module} in {root}")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            return find_class(root, ".".join([*base, *([node.module] if node.module else [])]), original)
    raise LookupError(f"{module} in {root} has no {name}")


def signatures(definition: ast.ClassDef) -> dict[str, Signature]:
    return {
        f"{definition.name}.{node.name}": signature(node.args)
        for node in definition.body
        if isinstance(node, ast.FunctionDef)
    }


def signature(args: ast.arguments) -> Signature:
    placed = [one.arg for one in (*args.posonlyargs, *args.args)]
    named = [one.arg for one in args.kwonlyargs]
    defaults = dict(zip(reversed(placed), reversed(args.defaults), strict=False))
    defaults |= {name: value for name, value in zip(named, args.kw_defaults, strict=True) if value is not None}
    names = tuple(name for name in (*placed, *named) if name not in ("self", "cls"))
    return Signature(names, {name: ast.unparse(value) for name, value in defaults.items()}, args.kwarg is not None)


def differences(method: str, ours: Signature, real: Signature) -> Iterator[str]:
    for name in ours.names:
        if name not in real.names:
            if not real.more:
                yield f"{method} takes no {name}"
        elif name in ours.defaults:
            if name not in real.defaults:
                yield f"{method} has no default for {name}"
            elif eval(ours.defaults[name], {}) != eval(real.defaults[name], {}):
                yield f"{method} has {name}={real.defaults[name]}, the stand-in {name}={ours.defaults[name]}"
    needed = [name for name in real.names if name not in real.defaults and name not in ours.names]
    if needed:
        yield f"{method} needs {', '.join(needed)}"
    places = BY_PLACE.get(method, ())
    if real.names[: len(places)] != places:
        yield f"{method} starts with {', '.join(real.names[: len(places)])}"


def compare(root: Any) -> list[str]:
    found: list[str] = []
    for place in PLACES:
        module, _, name = place.rpartition(".")
        real = signatures(find_class(root, module, name))
        for method, ours in signatures(find_class(STAND_IN, module, name)).items():
            if method in real:
                found += differences(method, ours, real[method])
            elif method.endswith("__init__"):  # others may be inherited there
                found.append(f"{method} is not there")
    return found


def test_the_stand_in_has_the_real_signatures() -> None:
    roots = sources()
    if not roots:
        pytest.skip(MISSING)
    assert {str(root): compare(root) for root in roots} == {str(root): [] for root in roots}


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        ("inp, m_splits, is_first_microbatch=None", []),
        ("inp, m_splits, more, is_first_microbatch=None", ["GroupedLinear.forward needs more"]),
        ("m_splits, inp, **kwargs", ["GroupedLinear.forward starts with m_splits, inp"]),
        ("inp, m_splits", ["GroupedLinear.forward takes no is_first_microbatch"]),
        ("inp, m_splits, is_first_microbatch", ["GroupedLinear.forward has no default for is_first_microbatch"]),
        (
            "inp, m_splits, *, is_first_microbatch=True",
            ["GroupedLinear.forward has is_first_microbatch=True, the stand-in is_first_microbatch=None"],
        ),
    ],
)
def test_another_signature_is_seen(real: str, expected: list[str]) -> None:
    (function,) = ast.parse(f"def forward(self, {real}): ...").body
    assert isinstance(function, ast.FunctionDef)
    method = "GroupedLinear.forward"
    ours = signatures(find_class(STAND_IN, "transformer_engine.pytorch", "GroupedLinear"))[method]
    assert list(differences(method, ours, signature(function.args))) == expected
