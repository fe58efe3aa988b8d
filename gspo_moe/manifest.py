"""What a folder holds, file by file, with a checksum of each, in a file beside them. Standard library only.

A checksum finds what disks, copies and mix-ups do to files. It is no signature: who writes files can write this one.
CRC-32 is the fastest that Python brings, and misses one damage in 4e9.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_moe.files import write_whole

MANIFEST_FILE = "gspo_moe_manifest.json"
_BLOCK = 1 << 22
_OWN = re.compile(r"__(\d+)_\d+\.distcp")  # of torch's writer: the process that wrote it


@dataclass(frozen=True)
class Manifest:
    """files: size in bytes and CRC-32 by name. about: what else the folder is to be known by."""

    files: Mapping[str, tuple[int, int]]
    about: Mapping[str, Any]


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def measured(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of these files."""
    return {name: ((folder / name).stat().st_size, crc32(folder / name)) for name in names}


def names_in(folder: Path) -> list[str]:
    """Everything in the folder but the manifest."""
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_FILE)


def share(names: Iterable[str], rank: int, ranks: int) -> list[str]:
    """Which files fall to a process: its own, as far as torch's writer tells, and every so many of the others."""
    ordered = sorted(names)
    owners = (int(own[1]) if (own := _OWN.fullmatch(name)) else number for number, name in enumerate(ordered))
    return [name for name, owner in zip(ordered, owners, strict=True) if owner % ranks == rank]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last line is the checksum of those before it."""
    body = json.dumps({"about": dict(manifest.about), "files": dict(manifest.files)}, indent=1) + "\n"
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
        files = {str(name): (int(size), int(checksum)) for name, (size, checksum) in found["files"].items()}
        return Manifest(files, dict(found["about"]))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no manifest ({error!r:.200})") from error


def damages(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of the manifest, by name."""
    found = []
    for name in names:
        size, checksum = manifest.files[name]
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != size:
            found.append(f"{name}: has {path.stat().st_size} bytes, and {size} were written")
        elif crc32(path) != checksum:
            found.append(f"{name}: its {size} bytes are not those that were written")
    return found
