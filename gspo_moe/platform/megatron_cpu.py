"""Lets an unchanged megatron-core run on a machine without a GPU.

Strategy: only modules below `megatron.core` see anything new. An import hook rewrites their compiled constants
("cuda" becomes "cpu", "torch.cuda.FloatTensor" becomes "torch.FloatTensor") and gives each of them, as its global
`torch`, a copy of torch's namespace whose `cuda` and `distributed` answer on CPU (`torch_overlay`); some of what they
import they get at its first use (`deferred`). torch itself and every other library keep what they had, save for the
entries of `ANSWERS` that say so.

Invariants: applied only where torch finds no GPU, before megatron.core's first import, once; refused for versions of
megatron-core that it was not tried on.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import torch

from gspo_moe.errors import ConfigError
from gspo_moe.platform.deferred import deferring_builtins
from gspo_moe.platform.lazy_dynamo import LazyDynamo
from gspo_moe.platform.torch_overlay import torch_overlay

PACKAGE = "megatron.core"
TRIED_VERSIONS = ((0, 16, 1), (0, 20))


@dataclass(frozen=True)
class Answer:
    """One thing of CUDA that megatron-core asks for, and why it is answered as it is."""

    asked: str
    answered: str
    reason: str


ANSWERS = (
    Answer('the constant "cuda"', '"cpu"', 'tensor factories and defaults name the device in code: device="cuda"'),
    Answer(
        'the constants "torch.cuda.*Tensor"',
        '"torch.*Tensor"',
        "gradient clipping and the distributed optimizer compare tensor.type() with them",
    ),
    Answer("torch.cuda.current_device()", "the CPU device", "it is passed on as a device for buffers"),
    Answer("torch.cuda streams, events, synchronize, nvtx", "no-ops", "CPU work is already in order"),
    Answer("torch.cuda RNG state", "a CPU generator of our own", "the RNG tracker saves, sets and forks it"),
    Answer(
        "torch.distributed.all_to_all_single with tensor splits",
        "the same call with lists",
        "the token dispatcher keeps split sizes as CPU tensors; gloo wants lists",
    ),
    Answer(
        "torch.distributed.all_gather and reduce_scatter of uneven parts",
        "the same through all_to_all_single",
        "with expert and expert tensor parallelism ranks gather unequal token counts; gloo wants equal parts",
    ),
    Answer("torch.compile and torch.jit.script fusions", "plain Python", "small fusions cost more to compile on CPU"),
    Answer(
        "moe_utils.te_general_gemm",
        "None",
        "without Transformer Engine 0.16.1 leaves the name undefined; moe_router_dtype then raises NameError",
    ),
    Answer(
        "torch.Tensor.cuda() (torch itself)",
        "the tensor, unmoved",
        "embedding sharing calls it; without a GPU it would only raise",
    ),
    Answer(
        "names of distributed tensors, FSDP, torch's checkpoints, TensorBoard and extensions",
        "the same ones, imported when they are first used",
        "their packages take two seconds to import, and a run uses them late or never",
    ),
    Answer(
        "torch._dynamo (torch itself)",
        "the same module, loaded at the first use of more than `disable` and `graph_break`",
        "optimizers and operators ask for those two, which mean nothing where nothing is compiled; it takes a second",
    ),
)


def _constants_for_cpu(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple(_constant_for_cpu(constant) for constant in code.co_consts))


def _constant_for_cpu(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        return _constants_for_cpu(constant)
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_constant_for_cpu(item) for item in constant)
    if constant == "cuda":
        return "cpu"
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        return constant.replace("torch.cuda.", "torch.")
    return constant


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module of megatron.core with its constants rewritten and its `torch` replaced."""

    torch_overlay: ModuleType

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return None if code is None else _constants_for_cpu(code)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = deferring_builtins(module.__name__, self.torch_overlay)
        super().exec_module(module)
        if vars(module).get("torch") is torch:
            vars(module)["torch"] = self.torch_overlay
        after = _AFTER_IMPORT.get(module.__name__)
        if after is not None:
            after(module)


def _disable_fusions(jit: Any) -> None:
    jit.disable_jit_fuser()


def _use_our_rng(random: Any) -> None:
    overlay = random.torch.cuda

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return overlay.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        overlay.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _define_te_gemm(moe_utils: Any) -> None:
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


_AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _disable_fusions,
    "megatron.core.tensor_parallel.random": _use_our_rng,
    "megatron.core.transformer.moe.moe_utils": _define_te_gemm,
}


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, torch_overlay: ModuleType) -> None:
        self._torch_overlay = torch_overlay

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            loader = _Loader(spec.loader.name, spec.loader.path)
            loader.torch_overlay = self._torch_overlay
            spec.loader = loader
        return spec


def megatron_version() -> str:
    """The installed megatron-core's version. Raises ConfigError where none is installed."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("megatron-core is not installed; run: bash launch/install.sh") from error


def check_megatron_version(version: str) -> None:
    """Raises ConfigError for a megatron-core that this project was not tried on."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    low, high = TRIED_VERSIONS
    if not low <= numbers < high:
        raise ConfigError(
            f"megatron-core {version} was not tried with this project; install one from "
            f"{'.'.join(map(str, low))} to below {'.'.join(map(str, high))}: pip install 'megatron-core>=0.16.1,<0.20'"
        )


def prepare_megatron() -> bool:
    """Makes megatron.core importable and usable here; call before its first import. True where it runs on CPU.

    Does nothing on a machine with a GPU. Raises ConfigError for an untried megatron-core and where megatron.core was
    imported before.
    """
    check_megatron_version(megatron_version())
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return True
    if PACKAGE in sys.modules:
        raise ConfigError(
            "megatron.core was imported before gspo_moe, without which it does not run on a CPU; put `import "
            "gspo_moe.model` above its first import"
        )
    sys.meta_path[:0] = [_Finder(torch_overlay()), LazyDynamo()]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    return True
