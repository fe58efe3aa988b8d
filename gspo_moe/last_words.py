"""What a process says when it ends with an error, alone and as one of a launcher's ranks."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from gspo_moe.errors import ConfigError, GspoMoeError, OutputError
from gspo_moe.files import no_room
from gspo_moe.garbage import imports

LAUNCHER_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# torchrun ends the other ranks once it sees the first one gone; until then they must not report that loss as a cause.
PEER_GRACE_SECONDS = 5.0
REFUSED = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EISDIR)
LONGEST_NAME = 100  # in messages


def full_disk(error: OSError) -> OutputError:
    """The error of a full disk with what to do about it."""
    where = f" ({error.filename})" if error.filename else ""
    return OutputError(
        f"{error.strerror}{where}; make room and start the same command again: whole files and checkpoints are left as "
        "they were, and a run goes on from its newest one"
    )


def of_the_system(error: Exception) -> GspoMoeError | None:
    """What to say of a full disk and of a path that the system refuses, however good its use; None of anything else."""
    full = no_room(error)
    if full is not None:
        return full_disk(full)
    if not isinstance(error, OSError) or error.errno not in REFUSED or error.filename is None:
        return None
    name = str(error.filename)
    shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}... ({len(name)} characters)"
    return ConfigError(f"{shown}: {error.strerror}; name another path, or see to its permissions")


def wait_for_another_ranks_cause(error: Exception) -> None:
    """Under a launcher, where `error` is merely the loss of a peer: leaves the launcher time to end this rank first."""
    if LAUNCHER_ERROR_FILE in os.environ and is_about_another_rank(error):
        time.sleep(PEER_GRACE_SECONDS)


def is_about_another_rank(error: BaseException) -> bool:
    """True for what a collective raises, which it mostly does because a peer has ended."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.join("torch", "distributed") in frames[-1].filename


def under_launcher(run: Callable[[argparse.Namespace], GspoMoeError | None]) -> Callable[..., GspoMoeError | None]:
    """Under torchrun, lets an unforeseen error of any rank reach the launcher's last words."""
    if LAUNCHER_ERROR_FILE not in os.environ:
        return run
    with imports():
        from torch.distributed.elastic.multiprocessing.errors import record

    wrapped: Callable[..., GspoMoeError | None] = record(run)
    return wrapped


def complain(error: GspoMoeError) -> None:
    """Of the ranks of a host the first that fails speaks: most fail with the same error, some alone."""
    text = f"gspo-moe: {type(error).__name__}: {error}"
    if LAUNCHER_ERROR_FILE in os.environ:
        file = Path(os.environ[LAUNCHER_ERROR_FILE])
        # torchrun prints what the first rank that failed leaves here as its last words.
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
        try:
            (file.parents[1] / "explained").touch(exist_ok=False)  # a folder of all of them
        except FileExistsError:
            return
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        return
    print(text, file=sys.stderr)
