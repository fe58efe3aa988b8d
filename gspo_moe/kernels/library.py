"""Loads the compiled kernels and says which there are, and how to get those that are missing."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache

from gspo_moe.errors import KernelError
from gspo_moe.kernels.build import library_fingerprint

logger = logging.getLogger(__name__)
BUILD = (
    "`pip install --no-build-isolation --editable .`, or `python setup.py build_ext --inplace` where nothing is to be "
    "installed, in the project's folder"
)


@dataclass(frozen=True)
class Kernels:
    """What is built. cpu: its instruction set, None without an extension. missing: why something is, with the fix."""

    cpu: str | None
    cuda: bool
    missing: str

    @property
    def summary(self) -> tuple[str, str]:
        """What there is, and what is missing: a line of `gspo-moe doctor`."""
        if self.cpu is None:
            return "PyTorch operators", f"log-probs run slower and need more memory: {self.missing}"
        return f"CPU ({self.cpu}){' and CUDA' if self.cuda else ''}", self.missing


@cache
def kernels() -> Kernels:
    """Loads the extension, whose import registers its kernels for the ops of `gspo_moe.kernels`.

    Raises KernelError where it was built of other sources than lie beside it.
    """
    try:
        extension = importlib.import_module("gspo_moe.kernels._C")
    except ModuleNotFoundError:
        return Kernels(None, False, f"no kernel is built; install g++ (and CUDA's nvcc for GPUs), then run {BUILD}")
    except ImportError as error:
        return Kernels(None, False, f"the built kernels do not load ({error}); build them anew with {BUILD}")
    expected = library_fingerprint()
    if expected is not None and getattr(extension, "sources", None) != expected:
        raise KernelError(
            f"{extension.__file__} was built of other sources than those in csrc beside it, so that its numbers may be "
            "wrong; build it anew with bash launch/install.sh, or delete it to run on PyTorch operators"
        )
    cuda = bool(extension.with_cuda)
    return Kernels(
        extension.cpu,
        cuda,
        "" if cuda else f"no CUDA kernel is built; install CUDA's nvcc 12.8 or newer, then run {BUILD}",
    )


@cache
def note_reference(device: str) -> None:
    """Logs, once a device, that the PyTorch operators of `reference` run there."""
    why = kernels().missing or f"there is no kernel for {device}"
    logger.warning("log-probs on %s are computed with PyTorch operators: %s", device, why)
