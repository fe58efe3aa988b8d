"""Which room may import which, and who may import megatron.core, read from the syntax tree of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the top down: a room imports only from floors below its own.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"study", "report", "replay"},
    {"training"},
    {"evaluation", "watching"},
    {"rollout", "scoring"},
    {"model", "routing"},
    {"parallel"},
    {"kernels", "data", "tasks", "observability", "planning"},
    {"platform", "config"},
    {"packages", "algorithms"},
    {"section", "manifest"},
    {"last_words"},
    {"types", "external", "files", "orphans", "plain_json"},
    {"errors", "garbage"},
    {"__init__"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MEGATRON_ROOMS = {"platform", "parallel", "model", "training"}
MEGATRON_MODULES = {"routing.recorder", "routing.replay"}
MODULES = sorted((ROOT / "gspo_moe").rglob("*.py"))


def imported(source: str, package: str) -> set[str]:
    """Dotted names that a module of `package` imports anywhere, `from x import y` as x.y."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str) -> list[str]:
    """What `module`, dotted below gspo_moe and with __init__ spelt out, imports against the rules."""
    room = module.split(".")[0]
    parent = module.rpartition(".")[0]
    found = []
    for name in sorted(imported(source, f"gspo_moe.{parent}" if parent else "gspo_moe")):
        top, _, rest = name.partition(".")
        if top == "gspo_moe":
            other = rest.split(".")[0]
            if other != room and FLOOR_OF.get(other, FLOOR_OF["__init__"]) <= FLOOR_OF[room]:
                found.append(f"{module} imports {name}, which is not on a floor below {room}")
        elif top == "megatron" and room not in MEGATRON_ROOMS and module not in MEGATRON_MODULES:
            found.append(f"{module} imports {name}; megatron.core is kept to the rooms that need it")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT / "gspo_moe").with_suffix("").parts)
    assert module.split(".")[0] in FLOOR_OF, f"{module} is in no room of FLOORS"
    assert violations(path.read_text(), module) == []


@pytest.mark.parametrize(
    ("source", "module", "count"),
    [
        ("from gspo_moe.training.step import run", "rollout.engine", 1),
        ("from gspo_moe import rollout", "training.loop", 0),
        ("from gspo_moe import training", "rollout.engine", 1),
        ("from gspo_moe.scoring.score import score", "rollout.embedded.engine", 1),
        ("from gspo_moe.routing import volatility", "model.build", 1),
        ("import gspo_moe.files", "types", 1),
        ("def f():\n    from ..cli import main", "algorithms.loss", 1),
        ("from .ratios import clip\nfrom ..errors import DataError", "algorithms.loss", 0),
        ("from . import ratios", "algorithms.__init__", 0),
        ("from gspo_moe.config import schema", "__init__", 1),
        ("import torch\nfrom megatron.core import parallel_state", "algorithms.loss", 1),
        ("import megatron.core", "routing.__init__", 1),
        ("from megatron import core", "routing.recorder", 0),
    ],
)
def test_the_rules_catch(source: str, module: str, count: int) -> None:
    assert len(violations(source, module)) == count
