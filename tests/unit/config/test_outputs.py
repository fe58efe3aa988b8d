from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gspo_moe.config.outputs import output_fault


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
