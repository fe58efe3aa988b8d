"""Where results go: found to be writable before the work starts. Torch-free."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

LONGEST_NAME = 100  # in messages
ROOM_FOR = "..partial"  # what goes around a name while its file is being written


def output_fault(path: Path, *, folder: bool = False) -> str | None:
    """Why the file `path` (or files in the folder `path`) cannot be written, with the fix; None where it can.

    Missing folders count as ones that will be made. Tries it with an empty file that goes away again, because
    permissions do not tell of read-only mounts, nor root's of anything.
    """
    try:
        return _fault(path, folder)
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        words = error.strerror if isinstance(error, OSError) else error
        return f"{_short(path)} cannot be written ({words}); name another {'folder' if folder else 'place'}"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}... ({len(text)} characters)"


def _fault(path: Path, folder: bool) -> str | None:
    if not folder and path.is_dir():
        return f"{path} is a folder; name a file"
    # Files are written beside their place and renamed, root's in the place of a device as well.
    if not folder and (path.is_symlink() or (path.exists() and not path.is_file())):
        return f"{path} is a device, pipe or link, which the written file would replace; name a regular file"
    if "\0" in str(path):
        raise ValueError("a null character")
    start = path if folder else path.parent
    there = next(one for one in (start, *start.absolute().parents) if one.exists())
    longest = max((len(os.fsencode(name)) for name in path.absolute().relative_to(there.absolute()).parts), default=0)
    limit = os.pathconf(there, "PC_NAME_MAX")  # -1 where there is none
    if 0 < limit < longest + len(ROOM_FOR):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    below = "" if there == path else f" lies below {there}, which"
    if not there.is_dir():
        return f"{path}{below} is a file; name a folder, which is made where it is missing"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".gspo_moe_"):
            return None
    except OSError as error:
        return f"{path}{below} is not writable ({error.strerror}); name another {'folder' if folder else 'place'}"
