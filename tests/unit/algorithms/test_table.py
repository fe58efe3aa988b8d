"""The table of algorithms: names, modules of others, what a specification must hold, and no torch to find it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gspo_moe.algorithms import Algorithm, Objective, Segments, Settings, algorithm_names, find_algorithm, policy_loss
from gspo_moe.config import load_config
from gspo_moe.errors import ConfigError
from gspo_moe.section import Section
from tests.losses import SPECS

ROOT = Path(__file__).parents[3]
OUTSIDE = """
from pydantic import PositiveFloat
from gspo_moe.algorithms import Algorithm, LossInputs, Objective
from gspo_moe.section import Section

class Options(Section):
    strength: PositiveFloat = 2.0

def reinforce(inputs: LossInputs) -> Objective:
    value_T = inputs.options.strength * inputs.advantages_T * inputs.log_probs_T
    nothing_N = 0.0 * inputs.segments.lengths_N
    seen = inputs.segments.response_T.double().sum()
    return Objective(inputs.sequence_mean(value_T), nothing_N, {"algorithm/seen": seen})

MySpec = Algorithm(name="reinforce", objective=reinforce, clips=None, options=Options)
NUMBER = 3
"""


def test_every_module_is_an_algorithm_of_its_name() -> None:
    assert {"gspo", "grpo"} < SPECS.keys()
    assert {name: spec.name for name, spec in SPECS.items()} == {name: name for name in algorithm_names()}


def test_the_package_names_an_algorithm_only_in_its_own_module() -> None:
    """The default of algorithm.name aside; the project's own name, and that of its kernels, is gspo's."""
    names = re.compile(rf"(?<![\w/])({'|'.join(name for name in algorithm_names() if name != 'gspo')})(?!\w)")
    package = ROOT / "gspo_moe"
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        if path.parent.name != "policies"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if names.search(line)
    ]
    assert found == []


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown algorithm 'gpso'; did you mean 'gspo'\? Known are .*grpo"):
        find_algorithm("gpso")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module, from which the program is started."""
    (tmp_path / "outside_algorithm.py").write_text(OUTSIDE, encoding="utf-8")
    (tmp_path / "broken_algorithm.py").write_text("import nothing_of_that_name", encoding="utf-8")
    (tmp_path / "leaving_algorithm.py").write_text("raise SystemExit(3)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    monkeypatch.delitem(sys.modules, "outside_algorithm", raising=False)
    find_algorithm.cache_clear()
    return tmp_path


def test_an_algorithm_from_outside_is_configured_and_computed_like_the_others(outside: Path) -> None:
    name = "outside_algorithm:MySpec"
    config = load_config(None, [f"algorithm.name={name}", "algorithm.options.strength=3"])
    assert config.algorithm.settings.strength == 3
    assert load_config(None, [f"algorithm.name={name}"]).algorithm.options == {"strength": 2.0}
    with pytest.raises(ConfigError, match=r"strengh=1; the nearest valid key is algorithm\.options\.strength"):
        load_config(None, [f"algorithm.name={name}", "algorithm.options.strengh=1"])
    with pytest.raises(ConfigError, match=r"algorithm\.options\.strength=-1: expected greater than 0"):
        load_config(None, [f"algorithm.name={name}", "algorithm.options.strength=-1"])
    with pytest.raises(ConfigError, match=r"clips nothing by algorithm\.clip_low"):
        load_config(None, [f"algorithm.name={name}", "algorithm.clip_low=0.1"])
    log_probs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    segments = Segments.of_pack(torch.tensor([0, 2, 3]), torch.ones(3))
    found = policy_loss(name, log_probs, log_probs.detach(), torch.tensor([1.0, -1.0]), segments)
    assert found.loss.item() == pytest.approx(-2 * (-1.5 + 3.0) / 2, rel=1e-14)
    assert found.metrics["algorithm/seen"] == 1
    assert found.metrics["clip_fraction/token"] == 0


def test_the_example_runs_from_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    config = load_config("quickstart.yaml", ["algorithm.name=my_algorithm:FADING", "algorithm.options.width=0.5"])
    algorithm = config.algorithm
    log_probs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.5, -2.0, -0.5], dtype=torch.float64)
    segments = Segments.of_pack(torch.tensor([0, 2, 3]), torch.ones(3))
    settings = Settings(options=algorithm.settings)
    found = policy_loss(algorithm.spec, log_probs, old, torch.tensor([1.0, -1.0]), segments, settings)
    faded = math.exp(-0.5)
    assert found.loss.item() == pytest.approx(-((faded * -1.0 - 2.0) / 2 + 0.5) / 2, rel=1e-14)
    (gradient,) = torch.autograd.grad(found.loss, log_probs)
    assert gradient.tolist() == pytest.approx([-faded / 4, -1 / 4, 1 / 2], rel=1e-14)
    assert found.metrics["algorithm/weight"] == pytest.approx((faded + 2) / 3, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:X", "No module named 'absent_module'"),
        ("broken_algorithm:X", "No module named 'nothing_of_that_name'); mend it, or"),
        ("broken_algorithm.py:X", "No module named 'nothing_of_that_name'); mend it, or"),
        ("leaving_algorithm:X", "failed (SystemExit: 3); mend it, or"),
        ("outside_algorithm:mySpec", "has no mySpec; it has Options, reinforce"),
        ("outside_algorithm:NUMBER", "is of type int; make it a gspo_moe.algorithms.Algorithm(...)"),
        ("outside_algorithm:my spec", "is not of the form my_module:name or path/to/file.py:name"),
        ("a/b.py:X", "importing a/b.py failed (FileNotFoundError"),
    ],
)
def test_what_cannot_be_imported_is_refused(name: str, message: str, outside: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(None, [f"algorithm.name={name}"])
    assert str(caught.value).startswith(f"algorithm.name='{name}': algorithm.name={name}")


class _Required(Section):
    strength: float


def nothing(inputs: object) -> Objective:
    raise NotImplementedError


def test_a_specification_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="option strength of mine has no default"):
        Algorithm("mine", nothing, None, options=_Required)
    with pytest.raises(ConfigError, match="needs a ValueOptions"):
        Algorithm("mine", nothing, None, advantages="gae")
    assert replace(SPECS["gspo"], objective=nothing).fused == "sequence"


def test_the_configuration_is_imported_without_torch() -> None:
    code = (
        "import sys, gspo_moe.config, gspo_moe.config.schema, gspo_moe.algorithms.table as t; t.algorithm_names();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
