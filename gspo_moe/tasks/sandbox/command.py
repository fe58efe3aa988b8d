"""The command lines that start a program: in bubblewrap, or without it."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.sandbox.options import SandboxOptions
from gspo_moe.tasks.sandbox.seccomp import call_filter

BUBBLEWRAP = "bwrap"
# Bound where it exists: what a dynamically linked Python needs besides its own folder.
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
FOLDER, PROGRAM = "/work", "/program.py"
HIGH_USERS = 0x70000000  # in no one's range of users
NOBODY = 65534
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
HERE = Path(__file__).parent
INSIDE = (HERE / "inside.py").read_text(encoding="utf-8")
# One module of both: the second's future import would stand too late.
INSIDE_OF_ASSERTIONS = INSIDE + (HERE / "remote.py").read_text(encoding="utf-8").replace("from __future__", "# ", 1)


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs programs.

    folders: all that it needs. packages: whether programs may use what its site-packages have.
    """

    executable: str
    folders: tuple[str, ...]
    packages: bool

    def start(self, job: dict[str, Any]) -> list[str]:
        inside = INSIDE_OF_ASSERTIONS if job["mode"] in ("serve", "check") else INSIDE
        options = ["-I", "-B", *([] if self.packages else ["-S"])]
        return [self.executable, *options, "-c", f"{inside}\nmain({job!r})"]


@dataclass
class Command:
    """A process to start.

    files: descriptors that it inherits, which are closed here once it has. folder: the program's, without bubblewrap.
    info: descriptor from which bubblewrap's own account of itself is read.
    """

    words: list[str]
    files: list[int] = field(default_factory=list)
    folder: str | None = None
    info: int | None = None

    def hold(self, content: bytes, name: str) -> int:
        """A descriptor of a file in memory that nobody can write to."""
        number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.files.append(number)
        with open(number, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(number, 0, os.SEEK_SET)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, SEALS)
        return number


def in_bubblewrap(
    interpreter: Interpreter, options: SandboxOptions, program: bytes, job: dict[str, Any], inherited: Iterable[int]
) -> Command:
    """Every namespace its own, nothing of the machine's files but the interpreter, read-only, and a small folder."""
    info, writes = os.pipe()
    command = Command([], [*inherited, writes], info=info)
    words = [BUBBLEWRAP, "--info-fd", str(writes), "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--hostname", "sandbox"]
    if os.geteuid() == 0:
        # Root keeps the machine's users, so that the program can be one of its own, whose processes a limit counts.
        words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--cap-drop", "ALL"]
    for above in dict.fromkeys(str(one) for path in interpreter.folders for one in reversed(Path(path).parents)):
        words += ["--perms", "0755", "--dir", above] if above != "/" else []
    for path in dict.fromkeys((*LIBRARIES, *interpreter.folders)):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind-try", path, path]
    for device in DEVICES:
        words += ["--dev-bind", device, device]
    words += ["--perms", "0444", "--ro-bind-data", str(command.hold(program, "program")), PROGRAM]
    words += ["--perms", "0777", "--size", str(options.disk_mb << 20), "--tmpfs", FOLDER, "--remount-ro", "/"]
    calls = call_filter(namespaces=True)
    if calls:
        words += ["--seccomp", str(command.hold(calls, "filter"))]
    asked = _job(options, job, program=PROGRAM, folder=FOLDER, keeps=False, filter="", processes=options.processes)
    command.words = [*words, "--", *interpreter.start(asked)]
    return command


def in_the_open(
    interpreter: Interpreter,
    options: SandboxOptions,
    program: bytes,
    job: dict[str, Any],
    inherited: Iterable[int],
    folder: str,
) -> Command:
    """Limits, a filter of calls and an unprivileged user, but the machine's own files and processes."""
    command = Command([], list(inherited), folder)
    file, own = Path(folder) / "program.py", Path(folder) / "files"
    own.mkdir(exist_ok=True)
    file.write_bytes(program)
    file.chmod(0o444)
    Path(folder).chmod(0o755)
    own.chmod(0o777)
    calls = call_filter(namespaces=False).hex()
    asked = _job(
        options,
        {**job, "starter": os.getpid()},
        program=str(file),
        folder=str(own),
        keeps=True,
        filter=calls,
        processes=options.processes,
    )
    command.words = [*interpreter.start(asked)]
    return command


def _job(options: SandboxOptions, job: dict[str, Any], **more: Any) -> dict[str, Any]:
    limits = {"cpu_seconds": math.ceil(options.cpu_seconds), "memory_mb": options.memory_mb, "disk_mb": options.disk_mb}
    return {**job, **limits, **more, "uid": _user() if os.geteuid() == 0 else None}


def _user() -> int:
    """A user that is nobody else, so that limits a user count this program alone; `nobody` where there are too few."""
    wanted = HIGH_USERS + int.from_bytes(os.urandom(3))
    first, _, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[0].split())
    return wanted if first <= wanted < first + count else NOBODY


@functools.cache
def interpreter_of(python: str | None, key: str) -> Interpreter:
    """The interpreter of `SandboxOptions.python`. Raises ConfigError, which calls it `key`, where it does not run."""
    asked = "import sys, os, json; print(json.dumps([os.path.realpath(sys.executable), sys.base_prefix, sys.prefix]))"
    found = shutil.which(python) if python else sys.executable
    try:
        ran = subprocess.run([str(found), "-I", "-c", asked], capture_output=True, text=True, check=True, timeout=60)
        executable, base, prefix = json.loads(ran.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"{key}.python={python} does not run as a Python ({error}); name one that does") from error
    folders = (os.path.dirname(executable), *(os.path.join(base, name) for name in ("lib", "lib64")))
    if python and prefix != base:  # of a virtual environment the program sees the packages
        return Interpreter(str(found), (*folders, prefix), True)
    return Interpreter(executable, tuple(path for path in folders if os.path.exists(path)), bool(python))
