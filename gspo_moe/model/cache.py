"""Keys and values of the tokens generated so far, and where in them a pack's tokens lie.

Shape letters: T tokens, B rows, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class KVCache:
    """Keys and values of every layer of this pipeline stage, [B, G, capacity, D] each, made at first use."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self,
        layer: int,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the tokens' keys and values at (row, position); returns the layer's whole buffers."""
        if layer not in self._layers:
            shape = (self.rows, key_TGD.shape[1], self.capacity, key_TGD.shape[2])
            self._layers[layer] = (key_TGD.new_zeros(shape), value_TGD.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[rows_T, :, positions_T] = key_TGD
        values[rows_T, :, positions_T] = value_TGD
        return keys, values

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, which a prefill has written to."""
        return self._layers[number]

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, in that order, in new memory; a row may be named more than once to copy it."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        self.rows = rows.numel()

    def copy(self, sources: list[int], targets: list[int], used: int) -> None:
        """Copies the first `used` positions of some rows over other ones, where they lie."""
        for buffers in self._layers.values():
            for buffer in buffers:
                for source, target in zip(sources, targets, strict=True):
                    buffer[target, :, :used] = buffer[source, :, :used]


@dataclass(frozen=True)
class CacheSlots:
    """Where a pack's tokens lie in a cache: rows_T and positions_T, int64 [T].

    in_order: rows_T is 0, 1, 2, ..., which spares decoding a copy of the cache.
    """

    cache: KVCache
    rows_T: torch.Tensor
    positions_T: torch.Tensor
    in_order: bool = False

    def write(self, layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the tokens' keys and values; returns the layer's whole buffers."""
        return self.cache.write(layer, self.rows_T, self.positions_T, key_TGD, value_TGD)
