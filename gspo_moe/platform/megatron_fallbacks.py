"""What megatron-core falls back to without Transformer Engine and Apex, by torch's kernels for many tensors at once.

Its own fallbacks go tensor by tensor: the gradient norm waits for the device at each, the clip makes a copy of each,
and torch's AdamW is a dozen passes over the state, on a GPU with 4 bytes a parameter of temporaries. On CPU and GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def adam_of(backend: str) -> Iterator[None]:
    """Has megatron-core make optimizers with the Adam of `model.backend.optimizer`: torch's for `local`, else its own.

    Its own is Transformer Engine's, else Apex's, else torch's, by what imports.
    """
    from megatron.core import optimizer

    if backend != "local":
        yield
        return
    found: Any = optimizer
    before = found.Adam, found.USING_PYTORCH_OPTIMIZER
    found.Adam, found.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    try:
        yield
    finally:
        found.Adam, found.USING_PYTORCH_OPTIMIZER = before


def use_torch_kernels(adams: Iterable[torch.optim.Optimizer]) -> None:
    """Gives gradient norm, clip and the Adams that are torch's one kernel for all tensors, or for as many as it takes.

    Does nothing where Transformer Engine or Apex brings its own.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale
    for adam in adams:
        if isinstance(adam, torch.optim.AdamW):
            for group in (adam.defaults, *adam.param_groups):
                group.update(fused=True, foreach=False)


def _l2_norm(
    _chunk: int, _overflow: Any, lists: list[list[torch.Tensor]], _per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """The norm [1] of all tensors together, as amp_C.multi_tensor_l2norm gives it, still on the device."""
    return torch.stack(torch._foreach_norm(lists[0])).norm().reshape(1), None


def _scale(_chunk: int, _overflow: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
    """Scales the first list's tensors into the second's, as amp_C.multi_tensor_scale."""
    source, target = lists
    if any(one is not other for one, other in zip(source, target, strict=True)):
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, factor)
