"""What runs in the sandbox around a program: takes limits upon itself, then does as its job says.

It runs as `python -I -c <this file, for assertions remote.py too, main(job)>`, of the standard library only. Nothing
that it does after the program has begun is trusted: a verdict is made of what comes out, by processes that the program
cannot reach. What not every program needs is imported where it is needed, because every program waits for it.
"""

from __future__ import annotations

import builtins
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType
    from typing import Any

MEGABYTE = 1 << 20
Module, Code, Function = type(sys), type((lambda: 0).__code__), type(lambda: 0)


def prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def confine(job: dict[str, Any]) -> None:
    """Limits, the unprivileged user and the filter of calls. Nothing of it can be undone."""
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    cpu = job["cpu_seconds"]
    for name, limit in (
        ("CORE", 0),
        ("AS", job["memory_mb"] * MEGABYTE),
        ("FSIZE", job["disk_mb"] * MEGABYTE),
        ("NOFILE", 128),
        ("NPROC", job["processes"]),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    data = resource.getrlimit(resource.RLIMIT_DATA)[1]  # a worker's own limit on memory is not the program's
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    if job["filter"]:
        filtered(bytes.fromhex(job["filter"]))
    os.chdir(job["folder"])


def filtered(program: bytes) -> None:
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    no_new_privileges, seccomp, mode_filter = 38, 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    steps = Program(len(program) // 8, program)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, mode_filter, ctypes.byref(steps), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    ahead = [pid]
    while ahead:
        try:
            ahead += (more := children(ahead.pop()))
            found += more
        except OSError:
            continue
    return found


def end_all() -> None:
    """Stops what is there until no more comes, then kills it: what a program left behind became this one's children."""
    import signal

    while children(os.getpid()):
        stopped: set[int] = set()
        while fresh := set(descendants(os.getpid())) - stopped:
            send(fresh, signal.SIGSTOP)
            stopped |= fresh
        send(stopped, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def keep(job: dict[str, Any]) -> None:
    """Without a process namespace: goes on in a child, and outlives it to kill all that it left.

    Where who started it is gone, it removes the folder too.
    """
    import signal

    death_signal, dumpable, subreaper = 1, 4, 36
    prctl(subreaper, 1)
    prctl(dumpable, 0)
    prctl(death_signal, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if os.getppid() != job["starter"]:  # the death came before the signal was asked for
        os.execv("/bin/rm", ["rm", "-rf", "--one-file-system", os.path.dirname(job["program"])])
    if job["uid"] is None:  # the limit counts all processes of the user
        job["processes"] += processes_of(os.getuid())
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        confine(job)
        prctl(death_signal, signal.SIGKILL)
        return
    code = 1
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()
        if os.getppid() != job["starter"]:
            os.execv("/bin/rm", ["rm", "-rf", "--one-file-system", os.path.dirname(job["program"])])
        os._exit(code if code >= 0 else 128 - code)


def processes_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def loaded(job: dict[str, Any], name: str) -> tuple[dict[str, Any], CodeType]:
    """The program's namespace and code, run by `exec` of the second in the first."""
    with open(job["program"], encoding="utf-8") as file:
        source = file.read()
    try:
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        tell(job, "compile", f"{type(error).__name__}: {error}"[:500])
        os._exit(1)
    module = Module(name)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    return module.__dict__, code


def tell(job: dict[str, Any], word: str, text: str) -> None:
    """Writes the job's result."""
    left = f"{word} {text}".encode(errors="replace")
    while left:
        left = left[os.write(job["result"], left) :]


def callable_of(names: dict[str, Any], wanted: str | None) -> Callable[..., Any]:
    """The function of that name, or the method of class Solution; else the last one defined."""
    solution = names.get("Solution")
    if isinstance(solution, type) and (wanted is None or hasattr(solution, wanted)):
        own = [name for name in vars(solution) if not name.startswith("_")]
        return getattr(solution(), wanted or own[-1])
    if wanted is None:
        own = [name for name, one in names.items() if isinstance(one, Function)]
        return names[own[-1]]
    return names[wanted]


def call(job: dict[str, Any]) -> None:
    """One call with the JSON values of standard input, one a line; its result goes out as JSON."""
    import io
    import json

    arguments = [json.loads(line) for line in sys.stdin.read().split("\n") if line.strip()]
    sys.stdin = io.StringIO()
    names, code = loaded(job, "solution")
    exec(imports_for(code), names)
    exec(code, names)
    tell(job, "value", json.dumps(callable_of(names, job["function"])(*arguments), default=list))


# What LeetCode has imported before a solution begins.
EXPORTS = {
    "typing": "List Dict Set Tuple Optional Union Any Callable Iterable Iterator Deque DefaultDict",
    "collections": "deque defaultdict Counter OrderedDict namedtuple",
    "functools": "lru_cache cache reduce cmp_to_key",
    "itertools": "accumulate combinations permutations product chain groupby count pairwise zip_longest",
    "heapq": "heappush heappop heapify heapreplace heappushpop nlargest nsmallest",
    "bisect": "bisect_left bisect_right insort",
    "math": "inf gcd lcm sqrt ceil floor comb isqrt",
}
MODULES = "math collections functools itertools heapq bisect re string random operator typing sys copy"


def imports_for(code: CodeType) -> str:
    words: set[str] = set()
    ahead = [code]
    while ahead:
        here = ahead.pop()
        words |= set(here.co_names)
        ahead += [one for one in here.co_consts if isinstance(one, Code)]
    lines = [f"import {name}" for name in MODULES.split() if name in words]
    for module, names in EXPORTS.items():
        lines += [f"from {module} import {name}" for name in names.split() if name in words]
    return "\n".join(lines)


def run(job: dict[str, Any]) -> None:
    names, code = loaded(job, "__main__")
    names["__builtins__"] = builtins
    os.close(job["result"])
    if job["shows_value"]:
        shown(job, names)
    else:
        exec(code, names)


def shown(job: dict[str, Any], names: dict[str, Any]) -> None:
    """Runs the program and prints the value of its last expression, unless that is None."""
    import ast

    with open(job["program"], encoding="utf-8") as file:
        tree = ast.parse(file.read())
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "program.py", "exec"), names)
    else:
        del tree.body[-1]
        exec(compile(tree, "program.py", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "program.py", "eval"), names)
        if value is not None:
            print(repr(value))


def main(job: dict[str, Any]) -> None:
    keep(job) if job["keeps"] else confine(job)
    globals()[job["mode"]](job)
