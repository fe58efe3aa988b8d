"""Runs nvcc's PTX on NumPy arrays over all threads of a grid at once.

Lanes that stand at the lowest instruction go first, so that lanes which parted meet again. A lane waits at a barrier
for its block and at a shuffle for the lanes of its mask; if nothing can go on, that is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tests.unit.kernels.cuda.interface import Array, Case, Mismatch
from tests.unit.kernels.cuda.ptx_arithmetic import TYPES, compute, convert, operand_type
from tests.unit.kernels.cuda.ptx_memory import GlobalMemory, SharedMemory
from tests.unit.kernels.cuda.ptx_parse import Address, Instruction, Kernel, Operand, PtxError

RUNNING, AT_BARRIER, AT_SHUFFLE, DONE = range(4)
WARP = 32


@contextmanager
def flushed_subnormals() -> Iterator[None]:
    """As `-ftz=true` has it; torch sets the processor's mode, which NumPy then computes in."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def run(kernel: Kernel, case: Case, grid: tuple[int, int], threads: int) -> tuple[int, int]:
    """Runs and checks a case; returns bytes read from and written to the counted buffer. Raises PtxError, Mismatch."""
    memory = GlobalMemory(case.buffers)
    arguments = bytes(case.arguments(memory.addresses))
    with flushed_subnormals(), np.errstate(all="ignore"):
        Machine(kernel, grid, threads, arguments, memory).run()
    case.check(memory.contents())
    traffic = memory.traffic[0], memory.traffic[1]
    if case.traffic is not None and traffic != case.traffic:
        raise Mismatch(f"{case.name}: PTX reads and writes {traffic} bytes, not {case.traffic}")
    return traffic


class Machine:
    def __init__(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, arguments: bytes, memory: GlobalMemory
    ) -> None:
        assert threads % WARP == 0
        blocks = grid[0] * grid[1]
        lanes = np.arange(blocks * threads)
        self.kernel, self.arguments, self.memory = kernel, arguments, memory
        self.block = (lanes // threads).astype(np.int32)
        self.warp = (lanes // WARP).astype(np.int32)
        self.threads = threads
        self.shared = SharedMemory(blocks, kernel.shared_bytes)
        self.epoch = np.zeros(blocks, dtype=np.int32)
        self.pc = np.zeros(len(lanes), dtype=np.int64)
        self.state = np.full(len(lanes), RUNNING, dtype=np.int8)
        self.registers = {name: np.zeros(len(lanes), dtype=dtype) for name, dtype in kernel.registers.items()}
        special = {
            "%tid.x": lanes % threads,
            "%ntid.x": np.full(len(lanes), threads),
            "%ctaid.x": self.block % grid[0],
            "%ctaid.y": self.block // grid[0],
            "%nctaid.x": np.full(len(lanes), grid[0]),
            "%nctaid.y": np.full(len(lanes), grid[1]),
        }
        self.registers |= {name: value.astype(np.uint32) for name, value in special.items()}

    def run(self) -> None:
        while (self.state != DONE).any():
            running = np.flatnonzero(self.state == RUNNING)
            if not len(running):
                self._release()
                continue
            positions = self.pc[running]
            lowest = positions.min()
            here = running[positions == lowest]
            ahead = positions[positions != lowest]
            self._go(here, int(lowest), int(ahead.min()) if len(ahead) else len(self.kernel.code))

    def _go(self, lanes: Array, pc: int, limit: int) -> None:
        """Runs lanes from pc until they part, wait, end, or reach others at `limit`."""
        while pc < limit:
            instruction = self.kernel.code[pc]
            chosen = lanes
            if instruction.predicate is not None:
                chosen = lanes[self.registers[instruction.predicate][lanes] != instruction.negated]
            try:
                match instruction.opcode[0]:
                    case "bra":
                        if 0 < len(chosen) < len(lanes):
                            self.pc[lanes] = pc + 1
                            self.pc[chosen] = instruction.target
                            return
                        pc = instruction.target if len(chosen) else pc + 1
                        if pc > limit:
                            break
                        continue
                    case "ret" | "bar" | "shfl":
                        if len(chosen) != len(lanes):
                            raise PtxError("only some lanes return or wait")
                        self.pc[lanes] = pc
                        if self._stop(instruction, lanes):
                            return
                    case _ if len(chosen):
                        self._execute(instruction, chosen)
            except PtxError as error:
                raise PtxError(f"{self.kernel.name}, {instruction.text!r}: {error}") from error
            pc += 1
        self.pc[lanes] = pc

    def _stop(self, instruction: Instruction, lanes: Array) -> bool:
        """Ends or parks lanes; False where a shuffle has all of its lanes and they go on together."""
        operation = instruction.opcode[0]
        if operation == "shfl":
            if len(lanes) % WARP == 0 and (self._mask(instruction, lanes) == 0xFFFFFFFF).all():
                warps = self.warp[lanes].reshape(-1, WARP)
                if (warps == warps[:, :1]).all():
                    self._shuffle(instruction, lanes)
                    return False
            self.state[lanes] = AT_SHUFFLE
        else:
            self.state[lanes] = DONE if operation == "ret" else AT_BARRIER
        return True

    def _release(self) -> None:
        """Lets go on what waits for each other; there must be something."""
        moved = False
        for block in np.unique(self.block[self.state == AT_BARRIER]):
            lanes = np.flatnonzero(self.block == block)
            if (self.state[lanes] == AT_BARRIER).all():
                if len(np.unique(self.pc[lanes])) != 1:
                    raise PtxError("threads of a block wait at different barriers")
                self.state[lanes] = RUNNING
                self.pc[lanes] += 1
                self.epoch[block] += 1
                moved = True
        for warp in np.unique(self.warp[self.state == AT_SHUFFLE]):
            moved |= self._release_shuffle(np.flatnonzero((self.warp == warp) & (self.state == AT_SHUFFLE)))
        if not moved:
            raise PtxError(f"{self.kernel.name}: threads wait at a barrier or shuffle that others never reach")

    def _release_shuffle(self, waiting: Array) -> bool:
        lowest = self.pc[waiting].min()
        lanes = waiting[self.pc[waiting] == lowest]
        instruction = self.kernel.code[lowest]
        masks = self._mask(instruction, lanes)
        present = int(np.bitwise_or.reduce(np.uint32(1) << (lanes % WARP).astype(np.uint32)))
        if (masks != present).any():
            return False
        self._shuffle(instruction, lanes)
        self.state[lanes] = RUNNING
        self.pc[lanes] += 1
        return True

    def _mask(self, instruction: Instruction, lanes: Array) -> Array:
        return self._value(instruction.operands[4], "u4", lanes)

    def _shuffle(self, instruction: Instruction, lanes: Array) -> None:
        """lanes: ascending, whole groups that name each other."""
        if instruction.opcode[:3] != ("shfl", "sync", "bfly"):
            raise PtxError("unknown shuffle")
        to, value, offset = instruction.operands[:3]
        source = lanes ^ self._value(offset, "u4", lanes).astype(np.int64)
        if not np.isin(source, lanes).all():
            raise PtxError("a shuffle reads a lane outside its mask")
        taken = self._value(value, "u4", source)
        self._set(str(to).split("|")[0], taken, lanes)

    def _value(self, operand: Operand, dtype: str, lanes: Array) -> Array:
        """An operand's bits as `dtype`, an immediate as one element."""
        assert isinstance(operand, str)
        register = self.registers.get(operand)
        if register is not None:
            return register[lanes] if dtype == "bool" else register[lanes].view(dtype)
        if operand.startswith("0f"):
            return np.array([struct.unpack(">f", bytes.fromhex(operand[2:]))[0]], dtype="f4").view(dtype)
        if operand.startswith("0d"):
            return np.array([struct.unpack(">d", bytes.fromhex(operand[2:]))[0]], dtype="f8").view(dtype)
        if operand not in self.kernel.symbols and not operand.lstrip("-").isdecimal():
            raise PtxError(f"unknown operand {operand}")
        number = self.kernel.symbols[operand] if operand in self.kernel.symbols else int(operand)
        bits = 8 * np.dtype(dtype).itemsize
        return np.array([number % (1 << bits)], dtype=f"u{bits // 8}").view(dtype)

    def _set(self, name: str, value: Array, lanes: Array) -> None:
        register = self.registers[name]
        if value.dtype != register.dtype:
            value = np.ascontiguousarray(value).view(register.dtype)
        register[lanes] = value

    def _execute(self, instruction: Instruction, lanes: Array) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        match opcode[0]:
            case "ld" | "st":
                self._access(instruction, lanes)
            case "mov" if any(isinstance(operand, tuple) for operand in operands):
                self._split_or_join(instruction, lanes)
            case "cvta":
                self._set(str(operands[0]), self._value(operands[1], "u8", lanes), lanes)
            case "cvt":
                sources = [self._value(operand, self._own_type(operand), lanes) for operand in operands[1:]]
                self._set_converted(str(operands[0]), convert(opcode, sources), lanes)
            case _:
                dtype = operand_type(opcode)
                kinds = self._operand_types(opcode, dtype, len(operands) - 1)
                values = [self._value(operand, kind, lanes) for operand, kind in zip(operands[1:], kinds, strict=True)]
                self._set(str(operands[0]), np.broadcast_to(compute(opcode, values, dtype), lanes.shape), lanes)

    @staticmethod
    def _operand_types(opcode: tuple[str, ...], dtype: str, count: int) -> list[str]:
        if opcode[0] == "selp":
            return [dtype, dtype, "bool"]
        if opcode[0] in ("shl", "shr"):
            return [dtype, "u4"]
        if opcode[0] == "mad" and "wide" in opcode:
            return [dtype, dtype, f"{dtype[0]}{2 * int(dtype[1])}"]
        return [dtype] * count

    def _own_type(self, operand: Operand) -> str:
        return self.registers[str(operand)].dtype.str[1:]

    def _set_converted(self, name: str, value: Array, lanes: Array) -> None:
        """A narrow result in a wide register keeps its sign."""
        register = self.registers[name]
        if value.dtype.itemsize < register.dtype.itemsize and value.dtype.kind in "ui":
            value = value.astype(f"{value.dtype.kind}{register.dtype.itemsize}")
        self._set(name, value, lanes)

    def _split_or_join(self, instruction: Instruction, lanes: Array) -> None:
        to, source = instruction.operands
        size = int(instruction.opcode[1][1:]) // 8
        if isinstance(to, tuple):
            whole = np.ascontiguousarray(self._value(source, f"u{size}", lanes))
            parts = whole.view(f"u{size // len(to)}").reshape(len(lanes), len(to))
            for name, part in zip(to, parts.T, strict=True):
                self._set(name, np.ascontiguousarray(part), lanes)
        else:
            assert isinstance(source, tuple)
            joined = np.stack(
                [np.broadcast_to(self._value(part, f"u{size // len(source)}", lanes), lanes.shape) for part in source],
                axis=1,
            )
            self._set(str(to), np.ascontiguousarray(joined).view(f"u{size}")[:, 0], lanes)

    def _access(self, instruction: Instruction, lanes: Array) -> None:
        opcode, (first, second) = instruction.opcode, instruction.operands
        loads = opcode[0] == "ld"
        address, registers = (second, first) if loads else (first, second)
        assert isinstance(address, Address)
        names = registers if isinstance(registers, tuple) else (str(registers),)
        dtype = TYPES[opcode[-1]]
        space, blocks = opcode[1], self.block[lanes]
        base = self._value(address.base, "u4" if space == "shared" else "u8", lanes)
        places = np.broadcast_to(base, lanes.shape) + base.dtype.type(address.offset % (1 << 8 * base.dtype.itemsize))
        if loads:
            for name, value in zip(names, self._load(space, places, dtype, len(names), blocks, lanes).T, strict=True):
                self._set_converted(name, np.ascontiguousarray(value), lanes)
            return
        values = np.stack([np.broadcast_to(self._narrow(name, dtype, lanes), lanes.shape) for name in names], axis=1)
        if space == "shared":
            self.shared.store(places, values[:, 0], blocks, self.warp[lanes], self.epoch[blocks])
        else:
            self.memory.store(places, values, blocks)

    def _narrow(self, name: str, dtype: str, lanes: Array) -> Array:
        """A register's low bits, as a store of fewer bytes takes them."""
        if name in self.registers and self.registers[name].dtype.itemsize > np.dtype(dtype).itemsize:
            return self.registers[name][lanes].astype(dtype)
        return self._value(name, dtype, lanes)

    def _load(self, space: str, places: Array, dtype: str, count: int, blocks: Array, lanes: Array) -> Array:
        if space == "param":
            found = np.frombuffer(self.arguments, dtype, 1, int(places[0]))
            return np.broadcast_to(found, (len(lanes), 1))
        if space == "shared":
            return self.shared.load(places, dtype, blocks, self.warp[lanes], self.epoch[blocks])[:, None]
        if space == "global":
            return self.memory.load(places, dtype, count, blocks)
        raise PtxError(f"unknown memory space {space}")
