"""Programs that try to get out of the sandbox, to hurt what is outside, or to be called right."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_moe.tasks.sandbox import ProgramTests, Sandbox
from tests.sandboxes import WAYS, alive, sandbox

MARK = 121  # megabytes, which stand in every command line of these sandboxes
SECRET = "hush-8c21"


@pytest.fixture(scope="module", params=WAYS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    return sandbox(request.param, memory_mb=MARK, processes=12, disk_mb=2, output_kb=64, cpu_seconds=1)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert alive(f"'memory_mb': {MARK}") == []


def test_a_fork_bomb_ends_with_its_program(box: Sandbox) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert box.run(bomb, wall_seconds=0.5).how == "wall"


def test_daemons_die_with_their_program(box: Sandbox) -> None:
    daemon = """
import os, time
reads, writes = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writes, b"up")
        time.sleep(60)
    os._exit(0)
os.wait()
print(os.read(reads, 2).decode())
"""
    ran = box.run(daemon)
    assert (ran.how, ran.output) == ("ended", "up\n")


def test_nothing_of_the_trainer_can_be_read(box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.txt"
    own.write_text(SECRET)
    own.chmod(0o600)
    monkeypatch.setenv("API_KEY", SECRET)
    program = f"""
import os
print(dict(os.environ))
pids = [name for name in os.listdir("/proc")] if os.path.exists("/proc") else [str(n) for n in range(1, 9)]
os.symlink({str(own)!r}, "link")
paths = [f"/proc/{{pid}}/{{name}}" for pid in filter(str.isdigit, pids) for name in ("environ", "mem", "root{own}")]
for path in [{str(own)!r}, "link", "/root/.bashrc", "/etc/shadow", *paths]:
    try:
        with open(path, errors="replace") as file:
            print(path, file.read(100000))
    except OSError:
        continue
"""
    ran = box.run(program)
    assert ran.how == "ended", ran
    assert SECRET not in ran.output
    assert "shadow" not in ran.output
    if box.closed:
        listing = box.run(f"import os\nprint(os.path.exists({str(Path.cwd())!r}), os.path.exists('/proc'))")
        assert listing.output == "False False\n"


def test_no_socket_reaches_the_machine(box: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"\0sandbox-{os.getpid()}"
        local.bind(name)
        local.listen()
        program = f"""
import socket
for family, address in ((socket.AF_INET, {server.getsockname()!r}), (socket.AF_UNIX, {name!r})):
    try:
        socket.socket(family).connect(address)
        print("through")
    except OSError as error:
        print("refused")
"""
        assert box.run(program).output == "refused\nrefused\n"
        for one in (server, local):
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.accept()


@pytest.mark.parametrize(
    ("program", "hows"),
    [
        ("while True: print('x' * 1000)", {"output"}),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
        ("x = bytearray(10 ** 10)", {"failed"}),
        ("f = open('a', 'wb')\nwhile True: f.write(b'x' * 100000); f.flush()", {"failed", "disk"}),
        ("for n in range(10 ** 6): open(str(n), 'wb').write(b'x' * 100000)", {"failed", "disk"}),
        ("import time\ntime.sleep(60)", {"wall"}),
        ("import os\nr, w = os.pipe()\nos.read(r, 1)", {"wall"}),
        ("input()", {"failed"}),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()", {"failed", "wall", "memory"}),
        ("import os\nos.memfd_create('x')", {"failed"}),
        ("import os\nos.abort()", {"failed"}),
    ],
)
def test_limits_end_the_program(box: Sandbox, program: str, hows: set[str]) -> None:
    assert box.run(program, wall_seconds=0.4 if "wall" in hows else 60.0).how in hows


def test_processor_time_is_limited(box: Sandbox) -> None:
    assert box.run("while True: pass", wall_seconds=30).how == "cpu"


def test_memory_of_all_processes_together_is_limited(box: Sandbox) -> None:
    program = """
import os, time
for number in range(4):
    if os.fork() == 0:
        held = bytearray(b"x") * (35 << 20)
        time.sleep(60)
time.sleep(60)
"""
    assert box.run(program, wall_seconds=20).how == "memory"


def test_signals_reach_nobody_else(box: Sandbox) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        program = f"""
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in (os.getppid(), {os.getpid()}, {other.pid}, -{os.getpgrp()}, -1, 1):
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except OSError:
            pass
"""
        box.run(program)
        assert other.poll() is None
        other.kill()


def test_files_outside_of_its_folder_stay_as_they_are(box: Sandbox, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    program = f"""
import os
os.symlink({str(victim)!r}, "link")
for path in ("link", {str(victim)!r}, "/program.py", "../program.py", os.__file__, "/new", "/usr/lib/new"):
    try:
        open(path, "w").write("changed")
        print(path)
    except OSError:
        pass
open("mine", "w").write("ok")
"""
    ran = box.run(program)
    assert (ran.how, ran.output) == ("ended", "")
    assert victim.read_text() == "as it was"


# Program, and the assertion if it is another than `assert f(1) == 3`.
FORGERIES: dict[str, tuple[str, ...]] = {
    "an object equal to all": (
        "class Any:\n    __eq__ = __req__ = lambda *_: True\n    __bool__ = lambda _: True\ndef f(x): return Any()",
    ),
    "a number equal to all": ("class Any(int):\n    __eq__ = lambda *_: True\ndef f(x): return Any()",),
    "a difference of nothing": (
        "class Any:\n    __sub__ = lambda *_: 0.0\ndef f(x): return Any()",
        "assert abs(f(1) - 3) < 1e-6",
    ),
    "a quotient of its own": (
        "class Any:\n    __truediv__ = lambda *_: 1\ndef f(x): return Any()",
        "assert f(1) / 3 == 1",
    ),
    "an object that has all": (
        "class Any:\n    __contains__ = lambda *_: True\ndef f(x): return Any()",
        "assert 3 in f(1)",
    ),
    "the end of the tests' loop": (
        "def f(x): raise StopIteration",
        "for found, value in zip(map(f, [1, 2]), [3, 4]):\n    assert found == value",
    ),
    "an early end": ("import os\nprint('passed')\nos._exit(0)",),
    "an end in the call": ("import os, sys\ndef f(x):\n    print('passed ')\n    sys.stdout.flush()\n    os._exit(0)",),
    "an exit": ("def f(x): raise SystemExit(0)",),
    "writing everywhere": (
        "import os\ndef f(x):\n    for n in range(64):\n        try: os.write(n, b'passed \\n')\n"
        "        except OSError: pass\n    os._exit(0)",
    ),
    "an answer of its own": (
        "import os\ndef f(x):\n    for n in range(3, 64):\n        try:\n"
        "            os.write(n, b'{\"value\": true}\\n')\n        except OSError: pass\n    return 7",
    ),
    "builtins of its own": ("def isinstance(*_): return True\ndef sorted(_): return 3\ndef f(x): return 7",),
    "builtins in place of the tests'": (
        'import os\nlines = [b\'{"names": {"__builtins__": {"dict": [["sum", {"kept": 0}]]}, "f": 7}}\\n\']\n'
        "for line in lines + [b'{\"value\": 3}\\n']:\n    for n in range(3, 64):\n"
        "        try: os.write(n, line)\n        except OSError: pass\nimport time\ntime.sleep(9)",
        "assert sum([f, 1]) == 3",
    ),
    "modules of its own": (
        "class math:\n    isclose = staticmethod(lambda *_: True)\ndef f(x): return 7",
        "import math\nassert math.isclose(f(1), 3)",
    ),
    "names that are none": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"names\": 3}\\n[]\\n')\n"
        "    except OSError: pass\ndef f(x): return 7",
    ),
    "patched builtins": (
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.__debug__ if 0 else 0\ndef f(x): return 7",
    ),
    "deep nonsense": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[' * 100000 + b'\\n')\n"
        "    except OSError: pass\ndef f(x): return 7",
    ),
}


@pytest.fixture(scope="module")
def either() -> Sandbox:
    return sandbox("either")


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_can_make_an_assertion_pass(name: str, either: Sandbox) -> None:
    program, *codes = FORGERIES[name]
    verdict = either.judge(program, ProgramTests("assert", code=(*codes, "assert f(1) == 3")[:1]), seconds=20)
    assert (verdict.passed, verdict.run) == (0, 1)
