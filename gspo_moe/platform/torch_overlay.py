"""torch's namespace as megatron-core sees it on a machine without a GPU: `cuda` and `distributed` answer on CPU.

torch itself stays as it is. `megatron_cpu.ANSWERS` says what is answered, and why.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch


def torch_overlay() -> ModuleType:
    """A copy of torch's namespace; its one generator stands for the GPU's."""
    distributed = _Overlay(
        torch.distributed,
        all_to_all_single=_all_to_all_single,
        all_gather=_all_gather,
        reduce_scatter=_reduce_scatter,
    )
    return _Overlay(torch, cuda=_cuda_overlay(), distributed=distributed, compile=_compile)


class _Event:
    """Stands for torch.cuda.Event: everything before it has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    """Stands for torch.cuda.Stream: the one order in which a CPU thread works."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Overlay(ModuleType):
    """A module's namespace with some names replaced; what it does not hold is looked up in the original."""

    def __init__(self, original: ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__)
        vars(self).update(vars(original))
        vars(self).update(replaced)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _compile(function: Any = None, **_: Any) -> Any:
    return (lambda it: it) if function is None else function


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _cuda_overlay() -> _Overlay:
    generator = torch.Generator()
    stream = _Stream()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        generator.set_state(state)

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return generator.get_state()

    nvtx = _Overlay(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, mark=_nothing)
    return _Overlay(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        device=lambda *_: contextlib.nullcontext(),
        Stream=_Stream,
        Event=_Event,
        stream=lambda _: contextlib.nullcontext(),
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        synchronize=_nothing,
        set_device=_nothing,
        empty_cache=_nothing,
        memory_allocated=lambda *_: 0,
        manual_seed=generator.manual_seed,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        nvtx=nvtx,
    )


def _splits_as_list(splits: Any) -> list[int] | None:
    return splits.tolist() if hasattr(splits, "tolist") else splits


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **kwargs: Any,
) -> Any:
    return torch.distributed.all_to_all_single(
        output, input, _splits_as_list(output_split_sizes), _splits_as_list(input_split_sizes), **kwargs
    )


def _all_gather(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
    sizes = [len(output) for output in outputs]
    if len(set(sizes)) == 1:
        return torch.distributed.all_gather(outputs, tensor, group=group, **kwargs)
    received = tensor.new_empty(sum(sizes), *tensor.shape[1:])
    copies = torch.cat([tensor] * len(sizes))
    torch.distributed.all_to_all_single(received, copies, sizes, [len(tensor)] * len(sizes), group=group)
    for output, part in zip(outputs, received.split(sizes), strict=True):
        output.copy_(part)
    return None


def _reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None, **kwargs: Any) -> Any:
    sizes = [len(part) for part in inputs]
    if len(set(sizes)) == 1:
        return torch.distributed.reduce_scatter(output, inputs, group=group, **kwargs)
    received = output.new_empty(len(sizes), *output.shape)
    torch.distributed.all_to_all_single(
        received.flatten(0, 1), torch.cat(inputs), [len(output)] * len(sizes), sizes, group=group
    )
    torch.sum(received, dim=0, out=output)
    return None
