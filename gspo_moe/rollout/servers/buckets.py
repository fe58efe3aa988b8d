"""Tensors one behind the other in one flat buffer of bytes, as weights are broadcast. torch alone.

SGLang's `flattened_bucket` lays them out the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorHead:
    """What is known of a tensor before it comes. dtype: as torch spells it, without `torch.`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def head_of(name: str, tensor: torch.Tensor) -> TensorHead:
    return TensorHead(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterator[tuple[list[TensorHead], torch.Tensor]]:
    """Cuts a stream of tensors of one dtype into buckets of at most `max_bytes`, or of one tensor; uint8 [bytes]."""
    heads: list[TensorHead] = []
    held: list[torch.Tensor] = []
    used = 0
    for name, tensor in tensors:
        if held and (used + tensor.nbytes > max_bytes or tensor.dtype != held[0].dtype):
            yield heads, flat(held)
            heads, held, used = [], [], 0
        heads.append(head_of(name, tensor))
        held.append(tensor)
        used += tensor.nbytes
    if held:
        yield heads, flat(held)


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their bytes, one behind the other; uint8 [bytes]."""
    return torch.cat([tensor.detach().flatten().view(torch.uint8) for tensor in tensors])


def empty_bucket(heads: Sequence[TensorHead], device: torch.device) -> torch.Tensor:
    return torch.empty(sum(head.nbytes for head in heads), dtype=torch.uint8, device=device)


def views(bucket: torch.Tensor, heads: Sequence[TensorHead]) -> list[torch.Tensor]:
    """The tensors that lie in the bucket, over its memory."""
    parts = bucket.split([head.nbytes for head in heads])
    return [part.view(head.torch_dtype).view(head.shape) for part, head in zip(parts, heads, strict=True)]
