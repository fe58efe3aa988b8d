import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gspo_moe import __version__, cli, packages
from gspo_moe.errors import ConfigError
from gspo_moe.kernels.build import CPU_FLAGS

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def absent(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else there(name))


def test_the_packages_are_those_that_an_installation_brings() -> None:
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    wanted = {re.split(r"[<>=]", requirement)[0] for requirement in requirements}
    assert wanted == {package.distribution for package in packages.PACKAGES}


def test_the_kernels_are_built_for_the_oldest_torch_that_is_allowed() -> None:
    train = PROJECT["optional-dependencies"]["train"]
    (oldest,) = (re.search(r"^torch>=(\d+)\.(\d+)$", line) for line in train if line[:5] == "torch")
    target = re.search(r"TORCH_TARGET_VERSION=(\w+)", " ".join(CPU_FLAGS))
    assert oldest is not None
    assert target is not None
    assert int(target[1], 16) == int(oldest[1]) << 56 | int(oldest[2]) << 48


def test_what_is_missing_is_named_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.missing() == []
    assert packages.describe_missing() == ""
    absent(monkeypatch, "psutil", "plotly")
    assert packages.describe_missing() == "psutil, plotly (gspo-moe report)"
    packages.require("matplotlib")
    with pytest.raises(ConfigError, match=r"psutil is not installed, which training needs; run `pip install psutil`"):
        packages.require("psutil")


@pytest.mark.parametrize(("module", "distribution"), [("yaml", "PyYAML"), ("megatron", "megatron-core")])
def test_a_command_that_misses_a_package_ends_with_the_fix(
    module: str, distribution: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.main(["doctor"]) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"gspo-moe: ConfigError: {distribution} is not installed, which training needs; run `pip ")


def test_another_failed_import_is_no_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'torch.nowhere'", name="torch.nowhere")

    monkeypatch.setattr(cli, "_doctor", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_the_version_is_known_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert "version" in PROJECT["dynamic"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: __version__)
    assert packages.installation() == (__version__, f"installed, run from {ROOT}")
    assert packages.install("train") == "`pip install 'gspo_moe[train]'`"
    monkeypatch.setattr(importlib.metadata, "version", not_found)
    assert packages.installation() == (__version__, f"not installed, run from its folder {ROOT}")
    assert packages.install("train") == f"`pip install '.[train]'` in {ROOT}"


def test_it_speaks_where_no_package_is() -> None:
    # -S leaves out every installed package.
    command = [sys.executable, "-S", "-m", "gspo_moe.packages"]
    found = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    needed = "torch megatron-core numpy psutil pydantic PyYAML rich safetensors tensorboard matplotlib"
    assert found.stderr == f"{sys.executable} lacks {needed.replace(' ', ', ')}; run `pip install {needed}`\n"
