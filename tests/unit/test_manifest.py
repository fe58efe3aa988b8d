"""Checksums of blocks, against zlib's of whole bytes."""

from __future__ import annotations

import io
import json
import random
import zlib
from pathlib import Path

import pytest

from gspo_moe import manifest
from gspo_moe.manifest import (
    MANIFEST_FILE,
    FileSums,
    Manifest,
    SummedFile,
    assembled,
    damages,
    measured,
    parts,
    read_manifest,
    share,
    sizes_in,
    write_manifest,
)

BLOCK = 100
SIZES = (0, 1, 99, 100, 101, 250, 1000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of these sizes, and blocks of 100 bytes."""
    monkeypatch.setattr(manifest, "BLOCK", BLOCK)
    for size in SIZES:
        (tmp_path / f"file_{size}").write_bytes(random.Random(size).randbytes(size))
    return tmp_path


def expected(path: Path) -> FileSums:
    content = path.read_bytes()
    starts = range(0, max(1, len(content)), BLOCK)
    return FileSums(len(content), tuple(zlib.crc32(content[start : start + BLOCK]) for start in starts))


def test_what_is_written_is_summed_however_it_is_cut(folder: Path) -> None:
    draw = random.Random(0)
    for source in sorted(folder.iterdir()):
        content = source.read_bytes()
        with SummedFile(folder / "copy") as raw, io.BufferedWriter(raw, 64) as file:
            while content:
                count = draw.randint(1, 130)
                file.write(content[:count])
                content = content[count:]
        assert (folder / "copy").read_bytes() == source.read_bytes()
        assert raw.sums == expected(source)


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_every_block_falls_to_one_process(folder: Path, ranks: int) -> None:
    sizes = sizes_in(folder)
    whole = parts(sizes, BLOCK)
    shares = [share(whole, rank, ranks) for rank in range(ranks)]
    assert [part for each in shares for part in each] == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    found = {part: value for each in shares for part, value in measured(folder, each, BLOCK).items()}
    blocks = {name: [value for part, value in found.items() if part.name == name] for name in sizes}
    assert {name: FileSums(sizes[name], tuple(each)) for name, each in blocks.items()} == {
        path.name: expected(path) for path in folder.iterdir()
    }


def test_manifests_of_versions_with_one_checksum_a_file(folder: Path) -> None:
    files = {path.name: (path.stat().st_size, zlib.crc32(path.read_bytes())) for path in folder.iterdir()}
    body = json.dumps({"about": {"run": "x"}, "files": files}, indent=1) + "\n"
    (folder / MANIFEST_FILE).write_text(f"{body}{zlib.crc32(body.encode())}\n")
    found = read_manifest(folder)
    assert found is not None
    whole = parts({name: sums.size for name, sums in found.files.items()}, found.block)
    assert len(whole) == len(SIZES)
    assert damages(folder, found, whole) == []
    (folder / "file_250").write_bytes(bytes(250))
    assert damages(folder, found, whole) == ["file_250: its 250 bytes are not those that were written"]


def test_a_manifest_that_lacks_checksums_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    sizes = sizes_in(tmp_path)
    write_manifest(tmp_path, Manifest(assembled(sizes, measured(tmp_path, parts(sizes))), {}))
    assert read_manifest(tmp_path) == Manifest({"file": FileSums(1, (zlib.crc32(b"1"),))}, {})
    write_manifest(tmp_path, Manifest({"file": FileSums(1, ())}, {}))
    with pytest.raises(ValueError, match="lacks checksums"):
        read_manifest(tmp_path)
