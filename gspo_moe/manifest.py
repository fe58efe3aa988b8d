"""What a folder holds, file by file, with checksums of each, in a file beside them. Standard library only.

A checksum finds what disks, copies and mix-ups do to files. It is no signature: who writes files can write this one.
CRC-32 is the fastest that Python brings, and misses one damage in 4e9. A file has one for each `BLOCK` bytes, so that
threads and processes can share a large file.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_moe.files import write_whole

MANIFEST_FILE = "gspo_moe_manifest.json"
BLOCK = 1 << 26
WHOLE = 1 << 62  # the block of versions that took one checksum a file
THREADS = 4
_READ = 1 << 22


@dataclass(frozen=True)
class FileSums:
    """size: in bytes. blocks: the CRC-32 of each block, the last of which may be short; one of an empty file."""

    size: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """files: by name. about: what else the folder is to be known by. block: bytes."""

    files: Mapping[str, FileSums]
    about: Mapping[str, Any]
    block: int = BLOCK


@dataclass(frozen=True)
class Part:
    """A block of a file, by number from 0."""

    name: str
    number: int


class SummedFile(io.FileIO):
    """A new file, written once from its beginning to its end, with the checksums of what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._size, self._blocks = 0, [0]

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written = super().write(view)
        view = view[:written]
        while view:
            if self._size == BLOCK * len(self._blocks):
                self._blocks.append(0)
            piece = view[: BLOCK * len(self._blocks) - self._size]
            self._blocks[-1] = zlib.crc32(piece, self._blocks[-1])
            self._size += len(piece)
            view = view[len(piece) :]
        return written

    def close(self) -> None:
        """Once all is on disk: what a writer syncs itself lacks what a buffer before this file still held."""
        if not self.closed:
            os.fsync(self.fileno())
        super().close()

    @property
    def sums(self) -> FileSums:
        return FileSums(self._size, tuple(self._blocks))


def crc32(path: Path, number: int = 0, block: int = WHOLE) -> int:
    """Of a block of the file."""
    value, left = 0, block
    with path.open("rb", buffering=0) as file:
        file.seek(number * block)
        while left and (read := file.read(min(_READ, left))):
            value, left = zlib.crc32(read, value), left - len(read)
    return value


def parts(sizes: Mapping[str, int], block: int = BLOCK) -> list[Part]:
    """Every block of these files."""
    return [Part(name, number) for name, size in sorted(sizes.items()) for number in range(max(1, -(-size // block)))]


def share(whole: Sequence[Part], rank: int, ranks: int) -> Sequence[Part]:
    """Which parts fall to a process: as many as to the others, and beside each other."""
    return whole[len(whole) * rank // ranks : len(whole) * (rank + 1) // ranks]


def measured(folder: Path, mine: Sequence[Part], block: int = BLOCK) -> dict[Part, int]:
    """The checksum of each of these parts."""
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(
            zip(mine, threads.map(lambda part: crc32(folder / part.name, part.number, block), mine), strict=True)
        )


def sizes_in(folder: Path) -> dict[str, int]:
    """Everything in the folder but the manifest, with bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE}


def assembled(sizes: Mapping[str, int], found: Mapping[Part, int]) -> dict[str, FileSums]:
    """Of the checksums of all parts of these files."""
    blocks: dict[str, list[int]] = {name: [] for name in sizes}
    for part in parts(sizes):
        blocks[part.name].append(found[part])
    return {name: FileSums(size, tuple(blocks[name])) for name, size in sizes.items()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last line is the checksum of those before it."""
    files = {name: [sums.size, *sums.blocks] for name, sums in sorted(manifest.files.items())}
    body = json.dumps({"about": dict(manifest.about), "block": manifest.block, "files": files}) + "\n"
    write_whole(folder / MANIFEST_FILE, f"{body}{zlib.crc32(body.encode())}\n")


def read_manifest(folder: Path) -> Manifest | None:
    """None where the folder has none. Raises ValueError where it is damaged itself, OSError where it cannot be read."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    body, _, last = (folder / MANIFEST_FILE).read_bytes().removesuffix(b"\n").rpartition(b"\n")
    if last != str(zlib.crc32(body + b"\n")).encode():
        raise ValueError("its checksum is wrong")
    try:
        found = json.loads(body)
        block = int(found.get("block", WHOLE))
        files = {
            str(name): FileSums(int(size), tuple(map(int, sums))) for name, (size, *sums) in found["files"].items()
        }
        if any(len(sums.blocks) != max(1, -(-sums.size // block)) for sums in files.values()):
            raise ValueError("it lacks checksums")
        return Manifest(files, dict(found["about"]), block)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"it is no manifest ({error!r:.200})") from error


def damages(folder: Path, manifest: Manifest, mine: Iterable[Part]) -> list[str]:
    """What is wrong with the files that these parts of the manifest are of, by name."""
    found, to_read = dict[str, str](), list[Part]()
    for part in mine:
        path, size = folder / part.name, manifest.files[part.name].size
        if not path.is_file():
            found[part.name] = "missing"
        elif path.stat().st_size != size:
            found[part.name] = f"has {path.stat().st_size} bytes, and {size} were written"
        else:
            to_read.append(part)
    for part, checksum in measured(folder, to_read, manifest.block).items():
        if checksum != manifest.files[part.name].blocks[part.number]:
            found[part.name] = f"its {manifest.files[part.name].size} bytes are not those that were written"
    return [f"{name}: {problem}" for name, problem in found.items()]
