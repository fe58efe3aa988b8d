"""Files and folders that appear whole: written beside their place, then renamed. Standard library only.

A run killed at any moment leaves what stood there before, or all of the new; a later writer clears what it left behind.
`reader_is_gone` is about the one file that others close: a process's output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, content: str | bytes | Callable[[Path], object], *, shared: bool = False) -> None:
    """Puts `content` (text as UTF-8, or what a function writes to the path it is given) in the place of the file.

    Missing folders are made; after an error nothing is left beside the file.
    shared: several processes may write the file at once, each the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        if callable(content):
            with usual_mode(partial):
                content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def usual_mode(file: Path) -> Iterator[None]:
    """Whoever writes the file meanwhile, it gets the mode that the umask gives; safetensors' own is 0600."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    file.unlink()
    yield
    with contextlib.suppress(OSError):  # some mounts know no modes
        file.chmod(mode)


def stage(folder: Path) -> Path:
    """Where what becomes `folder` is written: hidden beside it."""
    return folder.with_name(f".{folder.name}.partial")


def stage_folder(folder: Path) -> Path:
    """Makes the folder `stage(folder)`, empty, for `replace_folder`."""
    partial = stage(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts `partial` in the place of `folder`, which stays whole until the very renaming."""
    earlier = folder.with_name(f".{folder.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        os.replace(folder, earlier)
    os.replace(partial, folder)
    shutil.rmtree(earlier, ignore_errors=True)


def reader_is_gone(stream: TextIO) -> bool:
    """Whether nobody reads a process's output any more, as behind `| head`; what is left of it then goes nowhere."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors are told of in any case
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python complains when it flushes at its end
    return gone


def no_room(error: BaseException) -> OSError | None:
    """The error of a full disk, or a quota, that `error` is or comes from; None where it comes from something else.

    Libraries that write in processes of their own pass on no more than its words.
    """
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        if isinstance(one, OSError) and one.errno in NO_ROOM:
            return one
        for code in NO_ROOM:
            if os.strerror(code) in str(one):
                return OSError(code, os.strerror(code))
        seen.append(one)
        waiting += [one.__cause__, one.__context__]
    return None
