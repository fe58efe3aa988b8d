"""Nobody sees half a file or folder, whatever ends the writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from gspo_moe.files import no_room, replace_folder, stage_folder, write_whole


def interrupted(partial: Path) -> NoReturn:
    partial.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "content", ["é\n", "é\n".encode(), lambda partial: partial.write_text("é\n", encoding="utf-8")]
)
def test_a_file_appears_whole_where_folders_were_missing(content: object, shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_whole(path, content, shared=shared)  # type: ignore[arg-type]
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_stays_until_it_is_replaced(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(partial: Path) -> None:
        assert partial.parent == tmp_path
        partial.write_text("after")
        assert path.read_text() == "before"

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted, shared=shared)
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, write, shared=shared)
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_text("much longer than what comes now")
    write_whole(tmp_path / "file", "short")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "short")]


def test_writers_of_one_file_have_places_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, places = tmp_path / "file", []

    def write(partial: Path) -> None:
        places.append(partial)
        partial.write_text("same")
        if len(places) == 1:
            monkeypatch.setattr("os.getpid", lambda: 0)
            write_whole(path, write, shared=True)

    write_whole(path, write, shared=True)
    assert len(set(places)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_whole_until_another_takes_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    for content in ("before", "after"):
        stage_folder(folder)
        partial = stage_folder(folder)
        (partial / "file").write_text(content)
        # As a kill between the two renamings leaves it.
        (tmp_path / ".hf.earlier").mkdir()
        (tmp_path / ".hf.earlier" / "file").write_text("older")
        assert not folder.exists() or (folder / "file").read_text() == "before"
        replace_folder(partial, folder)
        assert (folder / "file").read_text() == content
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_known_by_its_number_and_by_its_words_anywhere_in_the_chain() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    assert no_room(full) is full
    assert no_room(OSError(errno.EACCES, os.strerror(errno.EACCES))) is None
    later = ValueError("closed")
    later.__context__ = full
    assert no_room(later) is full
    found = no_room(RuntimeError(f"Worker failure: {full}"))
    assert found is not None
    assert found.errno == errno.ENOSPC
    assert no_room(RuntimeError("Worker failure")) is None


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_modes_follow_the_umask_whoever_writes(mask: int, tmp_path: Path) -> None:
    def write(partial: Path) -> None:  # as safetensors does
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", write)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
