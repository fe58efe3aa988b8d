"""Checksums made anew for files that a test changed, as whoever means harm, or an older version, would have them."""

from pathlib import Path

from gspo_moe.manifest import Manifest, measured, names_in, read_manifest, write_manifest


def reseal(folder: Path) -> None:
    before = read_manifest(folder)
    assert before is not None
    write_manifest(folder, Manifest(measured(folder, names_in(folder)), before.about))
