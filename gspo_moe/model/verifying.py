"""Checksums of what holds a model: made as it is written, compared before anything of it is loaded.

Each process reads its share of the files' blocks, so that a file is read once, whatever the number of processes.
"""

from __future__ import annotations

import logging
import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gspo_moe.errors import CheckpointError, DamagedCheckpoint, DataError
from gspo_moe.manifest import (
    MANIFEST_FILE,
    FileSums,
    Manifest,
    assembled,
    damages,
    measured,
    parts,
    read_manifest,
    share,
    sizes_in,
    write_manifest,
)
from gspo_moe.model.weights import problem_list
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.stop import on_main, together

MARK = "manifest"  # in a checkpoint's common state: it has one, and lacks it where it is lost
COPY_AGAIN = "copy it again, or give another one"
WEIGHTS = (".distcp", ".safetensors", ".safetensors.index.json")  # what may be read; a note beside them does no harm
_log = logging.getLogger(__name__)


def add_manifest(folder: Path, about: Mapping[str, Any], written: Mapping[str, FileSums] | None = None) -> None:
    """Writes checksums of all that the folder holds, which must be complete. Collective.

    written: of files that this process wrote, which are not read again.
    Raises CheckpointError, on every process, where any cannot read its share or the first cannot write.
    """
    dist.barrier()
    try:
        sizes = on_main(lambda: sizes_in(folder))
        files = dict(ChainMap(*gather_objects(dict(written or {}))))
        cut = [name for name, sums in files.items() if sizes.get(name) != sums.size]
        if cut:
            raise OSError(f"{cut[0]} is not as long as what was written")
        unknown = {name: size for name, size in sizes.items() if name not in files}
        rank, readers = (
            dist.get_rank(),
            [one for one, there in enumerate(gather_objects(os.path.isdir(folder))) if there],
        )
        mine = share(parts(unknown), readers.index(rank), len(readers)) if rank in readers else []
        found = gather_objects(together(lambda: measured(folder, mine)))
        files |= assembled(unknown, ChainMap(*found))
        on_main(lambda: write_manifest(folder, Manifest(files, about)))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error}); free space on its disk, or name another"
        ) from error


def check_checkpoint(path: Path, about: Mapping[str, Any] | None = None, fix: str = f"; {COPY_AGAIN}") -> None:
    """Raises DamagedCheckpoint, on every process, that names what is not as it was written. Collective.

    about: what the manifest must say of the checkpoint; a value of None is not compared. fix: ends the first line.
    A checkpoint of another program or of an older version has no checksums, of which a warning tells.
    """
    problems = _problems(path, about or {})
    if problems is None:
        problems = _without_manifest(path)
    if problems:
        raise DamagedCheckpoint(problem_list(path, f"damaged, and nothing of it was loaded{fix}", problems))


def check_export(folder: Path) -> None:
    """Raises DataError, on every process, where files of an exported Hugging Face folder changed. Collective.

    Folders of other programs have no checksums. Files may be added, as long as they hold no weights.
    """
    problems = _problems(folder, {})
    if problems:
        fix = f"{COPY_AGAIN}; where you changed it yourself, remove {MANIFEST_FILE}, without which nothing is compared"
        raise DataError(problem_list(folder, f"damaged, and nothing of it was loaded; {fix}", problems))


def _problems(folder: Path, about: Mapping[str, Any]) -> list[str] | None:
    """None where there is no manifest. Collective."""
    manifest = on_main(lambda: _manifest(folder))
    if manifest is None or isinstance(manifest, str):
        return None if manifest is None else [manifest]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = parts({name: sums.size for name, sums in manifest.files.items()}, manifest.block)
    found = gather_objects(_told(lambda: damages(folder, manifest, share(whole, rank, ranks))))
    listed = _told(lambda: [path.name for path in folder.iterdir() if path.is_file()]) if rank == 0 else []
    names = gather_objects(listed)[0]
    for reader, part in enumerate([*found, names]):
        if isinstance(part, str):  # of one process, not of the folder
            raise CheckpointError(f"{folder} cannot be read by process {reader % ranks} ({part}); give it a way to it")
    problems = list(dict.fromkeys(problem for part in found for problem in part))
    unseen = [problem for problem in problems if problem.removesuffix(": missing") in names]
    if unseen:
        raise CheckpointError(
            f"{folder}: one process sees it whole, and another has {', '.join(unseen[:3])}; put it where all "
            "processes see it"
        )
    added = sorted(name for name in names if name not in manifest.files and name.endswith(WEIGHTS))
    problems += [f"{name}: not part of it" for name in added]
    known = gather_objects(dict(about))[0]  # the first one's, which others need not have
    return problems + [
        f"{key} is {manifest.about.get(key)} there and {value} here"
        for key, value in known.items()
        if None not in (value, manifest.about.get(key)) and manifest.about[key] != value
    ]


def _manifest(folder: Path) -> Manifest | str | None:
    """What is wrong with it, in words, where it cannot be used."""
    try:
        return read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE}: damaged itself ({error})" if folder.is_dir() else f"{folder.name}: is gone"


def _told(work: Callable[[], Any]) -> Any:
    """What it returns, or the words of its error, so that all know whose it is."""
    try:
        return work()
    except OSError as error:
        return str(error)


def _without_manifest(path: Path) -> list[str]:
    from gspo_moe.model.reading import load_common  # not above: it takes a second to import
    from gspo_moe.model.sharded import checkpoint_errors

    missing = on_main(lambda: [name for name in (".metadata", "metadata.json") if not (path / name).is_file()])
    if missing:
        return [f"{name}: missing" for name in (*missing, MANIFEST_FILE)]
    try:
        with checkpoint_errors(path, "loaded", COPY_AGAIN):
            marked = MARK in load_common(path)
    except CheckpointError as error:  # as of a copy that broke off
        return [f"{MANIFEST_FILE}: missing, and without it: {error}"]
    if marked:
        return [f"{MANIFEST_FILE}: missing"]
    if dist.get_rank() == 0:
        _log.warning("%s has no checksums, as versions before and other programs write none: it is not checked", path)
    return []
