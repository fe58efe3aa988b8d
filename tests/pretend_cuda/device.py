"""Puts the pretended GPU in place: torch.cuda's answers, tensor factories, module moves, autograd."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretend_cuda.tensor import CPU, CUDA, CudaTensor, moved, on_cuda, to_cuda
from tests.pretend_cuda.waits import wait

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    shared_memory_per_block_optin=232_448,
    warp_size=32,
)
# What autograd's own formulas make anew, where their gradients are.
MADE_BY_FORMULAS = {"zeros", "ones", "empty", "full", "scalar_tensor", "empty_strided", "new_zeros", "arange"}


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None:
        wait("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None:
        wait("stream.synchronize")

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Generator(torch.Generator):
    """One on the CPU, whatever device is asked for."""

    def __new__(cls, *_: Any, **__: Any) -> _Generator:
        return super().__new__(cls)


class _Graphs:
    """In place of `rollout.embedded.graphs.GraphPool`: nothing is captured, every step runs."""

    def run(self, _: Any, step: Any) -> Any:
        return step()


class _Factories(TorchFunctionMode):
    """torch.empty(..., device="cuda") and its like, and moves of CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], torch.Tensor):
            if name == "to":
                return moved(func, name, args, kwargs)
            if name == "cuda":
                if not isinstance(args[0], CudaTensor):
                    wait("to cuda")
                return to_cuda(args[0])
            if name == "__set__" and not isinstance(args[0], CudaTensor) and isinstance(args[1], CudaTensor):
                attribute = getattr(getattr(func, "__self__", None), "__name__", "")
                assert attribute != "data", "the .data of a CPU tensor is set to a tensor on cuda:0"
        if name == "tensor":
            scalars = [one for one in tree_flatten(args[0])[0] if isinstance(one, CudaTensor)]
            for _ in scalars:
                wait("torch.tensor of device scalars")
            args = (tree_map(lambda one: one.held.item() if isinstance(one, CudaTensor) else one, args[0]), *args[1:])
        kwargs.pop("pin_memory", None)  # which asks the driver
        if not on_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        kwargs["device"] = CPU
        if name in ("tensor", "as_tensor"):
            wait(f"torch.{name} to cuda")
        made = func(*args, **kwargs)
        return tree_map(
            lambda one: CudaTensor(one) if isinstance(one, torch.Tensor) and not isinstance(one, CudaTensor) else one,
            made,
        )


class _Formulas(TorchDispatchMode):
    """Tensors that autograd's C++ formulas make are where their gradients are; Python's backwards say where."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, torch.Tensor) or isinstance(out, CudaTensor):
            return out
        frame: Any = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        by_formula = frame.f_code is _run_backward.__code__ and func.overloadpacket.__name__ in MADE_BY_FORMULAS
        return CudaTensor(out) if by_formula else out


def _tuple(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, torch.Tensor) else tuple(given or ())


def _backward(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """torch.autograd.backward under `_Formulas`."""
    roots = _tuple(tensors)
    grads = _tuple(grad_tensors) or (None,) * len(roots)
    ones = (
        torch.ones_like(root) if grad is None and root.requires_grad else grad
        for root, grad in zip(roots, grads, strict=True)
    )
    with _Formulas():
        _run_backward(roots, tuple(ones), retain_graph, create_graph, _tuple(inputs))


def _run_backward(roots: Any, grads: Any, retain_graph: bool | None, create_graph: bool, inputs: Any) -> None:
    engine: Any = Variable._execution_engine
    retain = create_graph if retain_graph is None else retain_graph
    engine.run_backward(roots, grads, retain, create_graph, inputs, allow_unreachable=True, accumulate_grad=True)


_module_to = torch.nn.Module.to


def _to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    device = kwargs.get("device", args[0] if args else None)
    if not (isinstance(device, str | int | torch.device) and on_cuda(device)):
        return _module_to(self, *args, **kwargs)
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, CudaTensor):
                there = CudaTensor(parameter.detach().clone())
                module._parameters[name] = torch.nn.Parameter(there, parameter.requires_grad)
                vars(module._parameters[name]).update(vars(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, CudaTensor):
                module._buffers[name] = CudaTensor(buffer)
    return self


def install() -> None:
    """Puts one H100 in place; before anything of gspo_moe or megatron-core is imported."""
    assert "gspo_moe.platform" not in sys.modules
    assert "megatron.core" not in sys.modules
    os.environ.setdefault("LOCAL_RANK", "0")
    generator = torch.Generator()
    for name, answer in _answers(generator).items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "initial_seed"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: None)
    _replace(torch, "compile", lambda model=None, **_: model if model is not None else (lambda function: function))
    _replace(torch.nn.Module, "to", _to)
    _replace(torch.nn.Module, "cuda", lambda self, *_: _to(self, CUDA))
    _replace(torch.autograd, "backward", _backward)
    _Factories().__enter__()
    _join_the_project(generator)


def _replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _answers(generator: torch.Generator) -> dict[str, Any]:
    main = _Stream()
    nothing = dict.fromkeys(("set_device", "set_stream", "empty_cache", "init", "_lazy_init", "ipc_collect"))
    numbers: dict[str, Any] = dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), 0)
    numbers |= {"max_memory_reserved": 0, "current_device": 0, "device_count": 1, "reset_peak_memory_stats": None}
    numbers |= {"is_available": True, "is_initialized": True, "is_current_stream_capturing": False}
    numbers |= {"get_device_name": H100.name, "get_device_properties": H100, "mem_get_info": (70 * 2**30, 80 * 2**30)}
    numbers |= {"get_device_capability": (H100.major, H100.minor), "current_stream": main, "default_stream": main}

    def constant(value: Any) -> Any:
        return lambda *_, **__: value

    return {name: constant(value) for name, value in (nothing | numbers).items()} | {
        "synchronize": lambda *_: wait("cuda.synchronize"),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda _: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "_lazy_call": lambda call, **_: call(),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "initial_seed": generator.initial_seed,
        "get_rng_state": lambda *_: generator.get_state(),
        "set_rng_state": lambda state, *_: generator.set_state(state),
        "default_generators": (generator,),
    }


def _join_the_project(generator: torch.Generator) -> None:
    """One process over gloo, which takes these tensors; NCCL would want a GPU."""
    import gspo_moe.platform

    here = gspo_moe.platform.Device("cuda", CUDA, "gloo")
    for name in ("gspo_moe.platform", "gspo_moe.platform.device"):
        _replace(sys.modules[name], "device", lambda: here)
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.utils as megatron_utils

    # These reach into torch._C, which asks the driver.
    _replace(megatron_random, "_get_cuda_rng_state", lambda *_, **__: generator.get_state())
    _replace(megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: generator.set_state(state))

    def viewless(inp: Any, requires_grad: bool) -> CudaTensor:
        made = CudaTensor(inp.held)
        made.requires_grad_(requires_grad)
        return made

    _replace(megatron_utils, "_kernel_make_viewless_tensor", viewless)
    from gspo_moe.model import torch_attention

    def varlen(query_THD: Any, key_TGD: Any, value_TGD: Any, bounds: Any, key_bounds: Any, *_: Any, **__: Any) -> Any:
        # The kernel reads the bounds on the device, so that nobody waits for them.
        queries, keys = (each.held.diff().tolist() for each in (bounds, key_bounds))
        stretches = zip(query_THD.split(queries), key_TGD.split(keys), value_TGD.split(keys), strict=True)
        return torch.cat([torch_attention.causal_from_the_end(*each) for each in stretches]).view(query_THD.shape)

    _replace(torch_attention, "flash_attention", lambda: varlen)
    from gspo_moe.rollout.embedded import graphs

    _replace(graphs, "GraphPool", _Graphs)
    _replace(torch, "Generator", _Generator)
