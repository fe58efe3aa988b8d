"""Reads the PTX that nvcc writes for the project's kernels: as much of the language as they use, an error for more."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Registers by class; bits are kept unsigned.
REGISTER_TYPES = {"pred": "bool", "b16": "u2", "b32": "u4", "b64": "u8", "f32": "f4", "f64": "f8"}


class PtxError(Exception):
    """The interpreter cannot or must not go on; the message gives the line."""


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """`@predicate opcode operands`; opcode is split at its dots, a branch's target is an index into `Kernel.code`."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str
    target: int = -1


@dataclass
class Kernel:
    """registers: dtype by name; symbols: offset of shared arrays, and 0 for parameters."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0


def parse(text: str) -> dict[str, Kernel]:
    """Kernels by mangled name."""
    text = re.sub(r"//[^\n]*", "", text)
    found = {}
    for entry in re.finditer(r"\.entry\s+(\w+)\((.*?)\)[^{]*\{(.*?)\n\}", text, re.DOTALL):
        kernel = Kernel(entry[1])
        for parameter in re.findall(r"(\w+)\[\d+\]", entry[2]):
            kernel.symbols[parameter] = 0
        _parse_body(kernel, entry[3])
        found[kernel.name] = kernel
    return found


def _parse_body(kernel: Kernel, body: str) -> None:
    labels: dict[str, int] = {}
    pending: list[tuple[str, str | None, bool]] = []
    # Braces of inline assembly's scopes stand where a line begins or a statement ends.
    body = re.sub(r"^\s*[{}]", "", body, flags=re.MULTILINE)
    body = re.sub(r"^\s*(\$\w+):", r"\1:;", body, flags=re.MULTILINE)
    for statement in re.split(r"[;\n]", body):
        line = statement.strip()
        if line in ("", "}"):
            continue
        if line.startswith("."):
            _declare(kernel, line)
        elif line.endswith(":"):
            labels[line[:-1]] = len(pending)
        else:
            guard = re.match(r"@(!?)(%\w+)\s+(.*)", line, re.DOTALL)
            pending.append((guard[3], guard[2], bool(guard[1])) if guard else (line, None, False))
    for words, predicate, negated in pending:
        opcode, _, rest = words.partition("\t") if "\t" in words else words.partition(" ")
        operands = tuple(_operand(part) for part in _split(rest.strip()))
        branches = opcode.startswith("bra")
        target = labels[str(operands[0])] if branches else -1
        kernel.code.append(Instruction(tuple(opcode.strip().split(".")), operands, predicate, negated, words, target))


def _declare(kernel: Kernel, line: str) -> None:
    registers = re.match(r"\.reg \.(\w+)\s+(.+)", line)
    shared = re.match(r"\.shared \.align (\d+) \.\w(\d+) ([\w$]+)(?:\[(\d+)\])?", line)
    if registers and registers[1] in REGISTER_TYPES:
        for name in registers[2].split(","):
            many = re.match(r"(%\w+)<(\d+)>", name.strip())
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            kernel.registers.update(dict.fromkeys(names, REGISTER_TYPES[registers[1]]))
    elif shared:
        align, bits, count = int(shared[1]), int(shared[2]), int(shared[4] or 1)
        start = -(-kernel.shared_bytes // align) * align
        kernel.symbols[shared[3]] = start
        kernel.shared_bytes = start + bits // 8 * count
    elif not line.startswith(".pragma"):
        raise PtxError(f"unknown declaration: {line}")


def _split(text: str) -> list[str]:
    """Operands, at commas outside braces and brackets."""
    return [part.strip() for part in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", text) if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return text
