"""Every module alone in a fresh interpreter, as the first thing of the package that a user imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A child a module, forked where other packages are loaded and nothing of this one. megatron.core takes seconds to load,
# so its first import ends the child well, where what it needs without a GPU is in place.
PROGRAM = """
import importlib, json, os, sys, types, warnings
import torch, numpy, pydantic, yaml, psutil, matplotlib.figure, matplotlib.backends.backend_agg, plotly.offline
import rich.console, rich.progress, rich.table, rich.live, safetensors.torch, torch.utils.tensorboard, jinja2.sandbox
import torch.distributed.checkpoint, torch.nn.attention.varlen, reasoning_gym

class Reached(BaseException):
    pass

class Sentinel:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("megatron.core"):
            raise Reached

def ready():
    from gspo_moe.platform import megatron_cpu
    return torch.cuda.is_available() or any(isinstance(one, megatron_cpu._Finder) for one in sys.meta_path)

def first_import(name):
    sys.modules["megatron"] = types.ModuleType("megatron")
    sys.modules["megatron"].__path__ = []
    sys.meta_path.insert(0, Sentinel())
    try:
        importlib.import_module(name)
    except Reached:
        return "" if ready() else "imports megatron.core before it is made ready"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""

faults = {}
for name in json.loads(sys.stdin.read()):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, first_import(name).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        fault = said.read()
    os.wait()
    if fault:
        faults[name] = fault
print(json.dumps(faults))
"""


# Those that reach megatron.core; from others nothing but Python's own order can go wrong.
REACHING = {"parallel", "model", "routing", "training", "rollout", "scoring"}
IN_SERVERS = {"gspo_moe.rollout.servers.worker", "gspo_moe.rollout.servers.worker_routes"}  # which vLLM imports


def modules() -> list[str]:
    paths = sorted((ROOT / "gspo_moe").rglob("*.py"))
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in dotted if name not in IN_SERVERS]


def faults(names: list[str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_reaches_megatron_can_be_the_first_one_imported() -> None:
    names = [name for name in modules() if name.split(".")[1:2] and name.split(".")[1] in REACHING]
    assert {"gspo_moe.routing.recorder", "gspo_moe.training.checkpoint"} <= set(names)
    assert faults(names) == {}


@pytest.mark.slow
def test_every_module_can_be_the_first_one_imported() -> None:
    assert faults(modules()) == {}
