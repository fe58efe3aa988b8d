"""Memory of the interpreter, which refuses what a GPU leaves undefined: accesses outside a buffer, misaligned, to
shared memory nobody wrote, and races.

A race is two accesses to the same bytes, one of them a write, by two warps with no barrier between them (shared memory)
or by two blocks (global memory). Finding it needs no unlucky order: every access leaves its warp, or block, behind.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.unit.kernels.cuda.interface import Array, Buffer
from tests.unit.kernels.cuda.ptx_parse import PtxError

NOBODY, MANY = -1, -2
# Blocks have no barrier between them.
ALWAYS = np.zeros((1, 1), dtype=np.int32)
GUARD = 256
BASE = 1 << 16


class Shadow:
    """Who last read and wrote each granule, and since how many barriers."""

    def __init__(self, granules: int) -> None:
        self.writer = np.full(granules, NOBODY, dtype=np.int32)
        self.reader = np.full(granules, NOBODY, dtype=np.int32)
        self.write_epoch = np.zeros(granules, dtype=np.int32)
        self.read_epoch = np.zeros(granules, dtype=np.int32)

    def read(self, at: Array, who: Array, epoch: Array) -> bool:
        """False where another wrote in this epoch. at: [L, G] granules; who, epoch: [L, 1]."""
        written = (self.write_epoch[at] == epoch) & (self.writer[at] != NOBODY) & (self.writer[at] != who)
        shared = (self.read_epoch[at] == epoch) & (self.reader[at] != NOBODY) & (self.reader[at] != who)
        self.reader[at] = np.broadcast_to(who, at.shape)
        # Lanes of several readers may name one granule in one instruction: who lost the assignment is another reader.
        shared |= self.reader[at] != who
        self.reader[at[shared]] = MANY
        self.read_epoch[at] = np.broadcast_to(epoch, at.shape)
        return not written.any()

    def write(self, at: Array, who: Array, epoch: Array) -> bool:
        """False where another wrote or read in this epoch, or two lanes of this instruction write the same."""
        written = (self.write_epoch[at] == epoch) & (self.writer[at] != NOBODY) & (self.writer[at] != who)
        read = (self.read_epoch[at] == epoch) & (self.reader[at] != NOBODY) & (self.reader[at] != who)
        self.writer[at] = np.broadcast_to(who, at.shape)
        self.write_epoch[at] = np.broadcast_to(epoch, at.shape)
        return not (written.any() or read.any()) and len(np.unique(at)) == at.size


def _next_16(value: int) -> int:
    return -(-value // 16) * 16


class GlobalMemory:
    """Buffers at their offsets from 16-byte boundaries, with gaps between; addresses are generic."""

    def __init__(self, buffers: Mapping[str, Buffer]) -> None:
        self.addresses: dict[str, int] = {}
        self.buffers = dict(buffers)
        address, at = BASE, 0
        regions: list[tuple[int, int, int, bool]] = []
        for name, buffer in buffers.items():
            self.addresses[name] = address + buffer.offset
            rows = buffer.data if buffer.stride else [buffer.data]
            for index, row in enumerate(rows):
                regions.append(
                    (address + buffer.offset + index * buffer.stride, at + buffer.offset, row.nbytes, buffer.counted)
                )
                at = _next_16(at + buffer.offset + row.nbytes)
            address = _next_16(sum(regions[-1][::2]) + GUARD) if len(rows) else address
        self.starts, self.places, self.sizes, self.counted = (
            np.array(column, dtype=np.int64) for column in zip(*regions, strict=True)
        )
        self.bytes = np.zeros(at, dtype=np.uint8)
        self.shadow = Shadow(at // 2)
        self.traffic = [0, 0]
        given = b"".join(np.ascontiguousarray(buffer.data).tobytes() for buffer in buffers.values())
        self.bytes[self._inside()] = np.frombuffer(given, dtype=np.uint8)

    def _inside(self) -> Array:
        """Where in `bytes` the buffers' bytes are, in order."""
        spans = [np.arange(place, place + size) for place, size in zip(self.places, self.sizes, strict=True)]
        return np.concatenate(spans)

    def contents(self) -> dict[str, Array]:
        found, at = {}, 0
        inside = self.bytes[self._inside()]
        for name, buffer in self.buffers.items():
            part = inside[at : at + buffer.data.nbytes]
            found[name] = part.copy().view(buffer.data.dtype).reshape(buffer.data.shape)
            at += buffer.data.nbytes
        return found

    def _locate(self, addresses: Array, width: int, kind: int) -> Array:
        """Indices into `bytes`."""
        at = addresses.astype(np.int64)
        region = np.searchsorted(self.starts, at, side="right") - 1
        inside = at - self.starts[region]
        if (region < 0).any() or (inside + width > self.sizes[region]).any():
            raise PtxError("an access outside every buffer")
        if (at % width).any():
            raise PtxError("misaligned address")
        self.traffic[kind] += int(self.counted[region].sum()) * width
        return self.places[region] + inside

    def load(self, addresses: Array, dtype: str, count: int, blocks: Array) -> Array:
        """[L, count]."""
        size = np.dtype(dtype).itemsize
        at = self._locate(addresses, size * count, 0)
        if not self.shadow.read(self._granules(at, size * count), blocks[:, None], ALWAYS):
            raise PtxError("a block reads what another block writes")
        return self.bytes.view(dtype)[at[:, None] // size + np.arange(count)]

    def store(self, addresses: Array, values: Array, blocks: Array) -> None:
        """values: [L, count]."""
        size, count = values.dtype.itemsize, values.shape[1]
        at = self._locate(addresses, size * count, 1)
        if not self.shadow.write(self._granules(at, size * count), blocks[:, None], ALWAYS):
            raise PtxError("two threads write the same global memory, or a block what another reads")
        self.bytes.view(values.dtype)[at[:, None] // size + np.arange(count)] = values

    @staticmethod
    def _granules(at: Array, width: int) -> Array:
        return at[:, None] // 2 + np.arange(max(1, width // 2))


class SharedMemory:
    """One array a block; warps are numbered over the whole grid."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        self.bytes = np.full(blocks * self.stride, 0xFF, dtype=np.uint8)
        self.shadow = Shadow(blocks * self.stride // 4)

    def _locate(self, addresses: Array, width: int, blocks: Array) -> Array:
        offsets = addresses.astype(np.int64)
        if (offsets + width > self.size).any():
            raise PtxError("an access outside shared memory")
        if (offsets % width).any():
            raise PtxError("misaligned shared address")
        return offsets + blocks.astype(np.int64) * self.stride

    def load(self, addresses: Array, dtype: str, blocks: Array, warps: Array, epochs: Array) -> Array:
        size = np.dtype(dtype).itemsize
        at = self._locate(addresses, size, blocks)
        granules = at[:, None] // 4 + np.arange(size // 4)
        if (self.shadow.writer[granules] == NOBODY).any():
            raise PtxError("shared memory is read that nobody wrote")
        if not self.shadow.read(granules, warps[:, None], epochs[:, None]):
            raise PtxError("race: shared memory is read without a barrier after another warp's write")
        return self.bytes.view(dtype)[at // size]

    def store(self, addresses: Array, values: Array, blocks: Array, warps: Array, epochs: Array) -> None:
        size = values.dtype.itemsize
        at = self._locate(addresses, size, blocks)
        granules = at[:, None] // 4 + np.arange(size // 4)
        if not self.shadow.write(granules, warps[:, None], epochs[:, None]):
            raise PtxError("race: shared memory is written without a barrier after another thread's access")
        self.bytes.view(values.dtype)[at // size] = values
