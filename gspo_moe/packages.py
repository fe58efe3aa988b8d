"""The packages that this project is made on: what each is for, which are missing here, whether it is itself installed.

Imports none of them, so that it can speak where they are absent: `python -m gspo_moe.packages` ends with exit code 2 if
training cannot start.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from gspo_moe import __version__
from gspo_moe.errors import ConfigError

FOLDER = Path(__file__).parents[1]


@dataclass(frozen=True)
class Package:
    """A distribution and its module; `purpose` names what alone needs it, and is empty where training does."""

    distribution: str
    module: str
    purpose: str = ""


PACKAGES = (
    Package("torch", "torch"),
    Package("megatron-core", "megatron.core"),
    Package("numpy", "numpy"),
    Package("psutil", "psutil"),
    Package("pydantic", "pydantic"),
    Package("PyYAML", "yaml"),
    Package("rich", "rich"),
    Package("safetensors", "safetensors"),
    Package("tensorboard", "tensorboard"),
    Package("matplotlib", "matplotlib"),
    Package("aiohttp", "aiohttp", "rollout.engine=vllm and sglang"),
    Package("sentencepiece", "sentencepiece", "tokenizers of kind sentencepiece"),
    Package("tokenizers", "tokenizers", "tokenizers of kind hf"),
    Package("reasoning-gym", "reasoning_gym", "task.name=reasoning_gym/..."),
    Package("Jinja2", "jinja2", "gspo-moe report, chat templates"),
    Package("plotly", "plotly", "gspo-moe report"),
    Package("math-verify", "math_verify", "task.reward=math"),
    Package("pyarrow", "pyarrow", "task.data of .parquet and .arrow files"),
)


def missing() -> list[Package]:
    """The packages that no import would find."""
    return [package for package in PACKAGES if not _is_there(package.module)]


def describe_missing() -> str:
    """One line: each missing package, with what alone needs it; empty where there is none."""
    return ", ".join(
        f"{package.distribution} ({package.purpose})" if package.purpose else package.distribution
        for package in missing()
    )


def require(distribution: str) -> None:
    """Raises ConfigError with the fix where a package that is needed later is missing now."""
    (package,) = (package for package in PACKAGES if package.distribution == distribution)
    if not _is_there(package.module):
        raise ConfigError(_refusal(package))


def as_user_error(error: ModuleNotFoundError) -> ConfigError | None:
    """The failed import of a package as an error with its fix; None where it is of something else."""
    for package in PACKAGES:
        if error.name in (package.module, package.module.partition(".")[0]):
            return ConfigError(_refusal(package))
    return None


def installation() -> tuple[str, str]:
    """This project's version, and how Python comes to it."""
    try:
        importlib.metadata.version("gspo_moe")
    except importlib.metadata.PackageNotFoundError:
        return __version__, f"not installed, run from its folder {FOLDER}"
    return __version__, f"installed, run from {FOLDER}"


def install(extra: str) -> str:
    """The command that installs this project with an extra, however it runs now."""
    try:
        importlib.metadata.version("gspo_moe")
    except importlib.metadata.PackageNotFoundError:
        return f"`pip install '.[{extra}]'` in {FOLDER}"
    return f"`pip install 'gspo_moe[{extra}]'`"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _refusal(package: Package) -> str:
    needs = f"which {package.purpose} needs" if package.purpose else "which training needs"
    return (
        f"{package.distribution} is not installed, {needs}; run `pip install {package.distribution}`, or for all "
        f"packages {install('train')} or bash launch/install.sh (`gspo-moe doctor` lists what is missing)"
    )


def _main() -> int:
    needed = [package.distribution for package in missing() if not package.purpose]
    if needed:
        print(f"{sys.executable} lacks {', '.join(needed)}; run `pip install {' '.join(needed)}`", file=sys.stderr)
    return 2 if needed else 0


if __name__ == "__main__":
    sys.exit(_main())
