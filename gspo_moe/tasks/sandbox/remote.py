"""Assertions on a program that runs in another sandbox. Standard library only; it runs behind `inside.py`.

`check` executes the tests, in a process that no line of the program runs in; `serve` executes the program, and answers
what the tests ask of it with plain data. A name of the program is a `Remote` in the tests. No object of the program
can be equal to a plain value, whatever its `__eq__` says, nor hears of one by `in` or in arithmetic.
"""

from __future__ import annotations

import ast
import builtins
import json
import operator
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

Message = dict[str, Any]
ATOMS = (bool, int, float, str)
DEEPEST = 100
# What a test may do with an object of the program, by name; each is asked of the program.
OPERATIONS = {
    "__call__": lambda one, args, named: one(*args, **named),
    "__getattr__": lambda one, args, _: getattr(one, *args),
    "__setattr__": lambda one, args, _: setattr(one, *args),
    "__getitem__": lambda one, args, _: one[args[0]],
    "__setitem__": lambda one, args, _: operator.setitem(one, *args),
    "__delitem__": lambda one, args, _: operator.delitem(one, *args),
    "__iter__": lambda one, _, __: list(one),
    "__next__": lambda one, _, __: next(one),
    "__len__": lambda one, _, __: len(one),
    "__bool__": lambda one, _, __: bool(one),
    "__str__": lambda one, _, __: str(one),
    "__repr__": lambda one, _, __: repr(one),
    "__int__": lambda one, _, __: int(one),
    "__float__": lambda one, _, __: float(one),
    "__add__": lambda one, args, _: one + args[0],
    "__sub__": lambda one, args, _: one - args[0],
    "__mul__": lambda one, args, _: one * args[0],
    "__truediv__": lambda one, args, _: one / args[0],
    "__neg__": lambda one, _, __: -one,
    "__eq__": lambda one, args, _: one == args[0],
}
ARITHMETIC = ("__add__", "__sub__", "__mul__", "__truediv__")


class Values:
    """Values as JSON and back; an object that is no plain data stays where it is and travels as its number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def pack(self, value: Any, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise ValueError("too deep a value")
        below = depth + 1
        if value is None or type(value) in (bool, float, str):
            return value
        if isinstance(value, Remote):
            return {"own": object.__getattribute__(value, "_number")}
        if isinstance(value, int):
            return {"int": hex(int(value))}
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value).hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, dict):
            return {"dict": [[self.pack(key, below), self.pack(one, below)] for key, one in dict.items(value)]}
        kinds: tuple[type[Iterable[Any]], ...] = (list, tuple, set, frozenset)
        for kind in kinds:
            if isinstance(value, kind):
                return {kind.__name__: [self.pack(one, below) for one in kind.__iter__(value)]}
        if isinstance(value, float | str):
            return float(value) if isinstance(value, float) else str(value)
        self.kept.append(value)
        return {"kept": len(self.kept) - 1}

    def unpack(self, packed: Any, remote: Program | None = None) -> Any:
        if packed is None or isinstance(packed, ATOMS):
            return packed
        ((kind, inner),) = packed.items()
        if kind == "int":
            return int(inner, 16)
        if kind == "bytes":
            return bytes.fromhex(inner)
        if kind == "complex":
            return complex(*inner)
        if kind == "dict":
            return {self.unpack(key, remote): self.unpack(one, remote) for key, one in inner}
        if kind == "own":
            return self.kept[inner]
        if kind == "kept":
            return Remote(remote, int(inner))
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](
            self.unpack(one, remote) for one in inner
        )


class Lines:
    """Messages as JSON lines over two file descriptors."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = os.fdopen(reads, encoding="utf-8"), os.fdopen(writes, "w", encoding="utf-8")

    def send(self, message: Message) -> None:
        self.writes.write(json.dumps(message) + "\n")
        self.writes.flush()

    def receive(self) -> Message | None:
        line = self.reads.readline()
        return json.loads(line) if line else None


def serve(job: Message) -> None:
    """Executes the program, says which names it defined, and answers until nobody asks."""
    lines, values = Lines(*job["lines"]), Values()
    names, code = loaded(job, "solution")  # type: ignore[name-defined]  # noqa: F821
    os.close(job["result"])
    exec(imports_for(code), names)  # type: ignore[name-defined]  # noqa: F821
    exec(code, names)
    own = {name: one for name, one in names.items() if not name.startswith("__") and not is_foreign(one)}
    lines.send({"names": {name: values.pack(one) for name, one in own.items()}})
    while (asked := lines.receive()) is not None:
        try:
            one, arguments = values.kept[asked["of"]], values.unpack(asked["arguments"])
            named = values.unpack(asked["named"])
            lines.send({"value": values.pack(OPERATIONS[asked["operation"]](one, arguments, named))})
        except Exception as error:
            lines.send({"raised": type(error).__name__, "said": str(error)[:500]})


def is_foreign(one: Any) -> bool:
    """What a program imported: tests import for themselves."""
    return isinstance(one, type(sys)) or getattr(one, "__module__", "solution") not in ("solution", None)


class Gone(BaseException):
    """The program has ended, or says what no program of this file would."""


class Program:
    """The other end, as `check` sees it."""

    def __init__(self, lines: Lines) -> None:
        self.lines, self.values = lines, Values()

    def receive(self) -> Message:
        try:
            found = self.lines.receive()
        except ValueError as error:
            raise Gone from error
        if not isinstance(found, dict):
            raise Gone
        return found

    def ask(self, number: int, operation: str, arguments: Iterable[Any], named: dict[str, Any]) -> Any:
        packed = {"arguments": self.values.pack(tuple(arguments)), "named": self.values.pack(named)}
        try:
            self.lines.send({"of": number, "operation": operation, **packed})
        except OSError as error:
            raise Gone from error
        answer = self.receive()
        if "raised" in answer:
            kind = getattr(builtins, str(answer["raised"]), None)
            if kind is StopIteration and operation != "__next__":  # it would end a loop of the tests early
                kind = None
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(answer["said"])
        try:
            return self.values.unpack(answer["value"], self)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Gone from error


class Remote:
    """An object of the program; what is done with it is done there."""

    def __init__(self, program: Program | None, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(asked(self, "__eq__", (other,), {}))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))

    def __iter__(self) -> Iterator[Any]:
        return iter(asked(self, "__iter__", (), {}))


def asked(one: Remote, operation: str, arguments: Iterable[Any], named: dict[str, Any]) -> Any:
    program = object.__getattribute__(one, "_program")
    return program.ask(object.__getattribute__(one, "_number"), operation, arguments, named)


def _forward(operation: str) -> Any:
    return lambda one, *arguments, **named: asked(one, operation, arguments, named)


def _between_objects(operation: str) -> Any:
    """With a plain value it is left to Python, which raises: `f(1) - 3` would tell the program what is expected."""
    return lambda one, other: asked(one, operation, (other,), {}) if isinstance(other, Remote) else NotImplemented


for _operation in OPERATIONS:
    if _operation not in vars(Remote):
        setattr(Remote, _operation, (_between_objects if _operation in ARITHMETIC else _forward)(_operation))


def check(job: Message) -> None:
    """Executes the tests that stand in the program's place; their standard streams go nowhere.

    A function with the name of a builtin or a module is the program's only where the tests are said to be about it.
    """
    program = Program(Lines(*job["lines"]))
    with open(job["program"], encoding="utf-8") as file:
        tests = compile(file.read(), "tests.py", "exec", dont_inherit=True)
        file.seek(0)
        words = {node.id for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Name)}
    names: dict[str, Any] = {"__name__": "tests"}
    names |= {word: __import__(word) for word in words if word in sys.stdlib_module_names}
    try:
        for name, packed in program.receive()["names"].items():
            if name.startswith("__"):  # `__builtins__` would give the tests others
                raise Gone
            if name == job["function"] or not (hasattr(builtins, name) or name in names):
                names[name] = program.values.unpack(packed, program)
        if job["function"] in names:
            names["candidate"] = names[job["function"]]
        exec(tests, names)
        verdict = ("passed", "")
    except Gone:
        verdict = ("failed", "the program ended")
    except BaseException as error:
        verdict = ("failed", f"{type(error).__name__}: {error}"[:500])
    tell(job, *verdict)  # type: ignore[name-defined]  # noqa: F821
    os._exit(0)
