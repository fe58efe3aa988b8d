from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gspo_moe.config.outputs import LOCK_FILE, hold, output_fault
from gspo_moe.errors import ConfigError

# Holds the folder and has a child, as trainers have reward workers, that outlives it.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from gspo_moe.config.outputs import hold
hold(Path(sys.argv[1]), "logging.run_dir")
print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""


def test_what_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    assert output_fault(tmp_path / "file") is None
    assert output_fault(tmp_path / "new" / "folder" / "file") is None
    assert output_fault(tmp_path, folder=True) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("kept")
    assert output_fault(tmp_path / "old") is None
    assert (tmp_path / "old").read_text() == "kept"


def test_a_file_system_without_a_limit_on_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pathconf", lambda *_: -1)
    assert output_fault(tmp_path / "file") is None


def test_what_cannot_be_written_is_told_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    assert output_fault(tmp_path) == f"{tmp_path} is a folder; name a file"
    assert output_fault(file, folder=True) == f"{file} is a file; name a folder, which is made where it is missing"
    assert "lies below" in (output_fault(file / "run" / "out") or "")
    (tmp_path / "link").symlink_to(file)
    for special in (Path("/dev/stdout"), Path("/dev/null"), tmp_path / "link"):
        told = f"{special} is a device, pipe or link, which the written file would replace; name a regular file"
        assert output_fault(special) == told

    def refuse(**_: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)  # as a read-only mount does, to root too
    assert output_fault(tmp_path, folder=True) == (
        f"{tmp_path} is not writable (Read-only file system); name another folder"
    )
    assert output_fault(tmp_path / "new" / "file") == (
        f"{tmp_path}/new/file lies below {tmp_path}, which is not writable (Read-only file system); name another place"
    )


def test_a_folder_is_held_until_its_process_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        before = (run / LOCK_FILE).read_text()
        try:
            with pytest.raises(
                ConfigError, match=re.escape(f"logging.run_dir={run} is in use by process {holder.pid} on")
            ):
                hold(run, "logging.run_dir")
            assert (run / LOCK_FILE).read_text() == before
            holder.kill()
            holder.wait()
            hold(run, "logging.run_dir")
            hold(run, "logging.run_dir")
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)
    assert f'"pid": {os.getpid()}' in (run / LOCK_FILE).read_text()
    second = subprocess.run(command, capture_output=True, text=True)
    assert f"is in use by process {os.getpid()} on" in second.stderr
