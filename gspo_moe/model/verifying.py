"""Checksums of what holds a model: made as it is written, compared before anything of it is loaded.

Each process reads its share of the files, so that a file is read once, whatever the number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gspo_moe.errors import CheckpointError, DamagedCheckpoint, DataError
from gspo_moe.manifest import MANIFEST_FILE, Manifest, damages, measured, names_in, read_manifest, share, write_manifest
from gspo_moe.model.weights import problem_list
from gspo_moe.parallel.reduce import gather_objects

MARK = "manifest"  # in a checkpoint's common state: it has one, and lacks it where it is lost
COPY_AGAIN = "copy it again, or give another one"
_log = logging.getLogger(__name__)


def add_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes checksums of all that the folder holds, which must be complete. Collective.

    Raises CheckpointError, on every process, where any cannot read its share or the first cannot write.
    """
    rank = dist.get_rank()
    dist.barrier()
    names = gather_objects(_told(lambda: names_in(folder)) if rank == 0 else [])[0]
    problems, found = [names] if isinstance(names, str) else [], list[Any]()
    if not problems:
        readers = [reader for reader, there in enumerate(gather_objects(folder.is_dir())) if there]
        mine = share(names, readers.index(rank), len(readers)) if rank in readers else []
        found = gather_objects(_told(lambda: measured(folder, mine)))
        problems = [each for each in found if isinstance(each, str)]
    if not problems:
        files = {name: each for part in found for name, each in part.items()}
        written = _told(lambda: write_manifest(folder, Manifest(files, about)) if rank == 0 else None)
        problems = [each for each in gather_objects(written) if each is not None]
    if problems:
        raise CheckpointError(f"{folder} cannot be written ({problems[0]}); free space on its disk, or name another")


def _told(work: Callable[[], Any]) -> Any:
    """What it returns, or the words of its error: processes that wait for each other must not leave alone."""
    try:
        return work()
    except OSError as error:
        return str(error)


def check_checkpoint(path: Path, about: Mapping[str, Any] | None = None, fix: str = f"; {COPY_AGAIN}") -> None:
    """Raises DamagedCheckpoint, on every process, that names what is not as it was written. Collective.

    about: what the manifest must say of the checkpoint; a value of None is not compared. fix: ends the first line.
    A checkpoint of another program or of an older version has no checksums, of which a warning tells.
    """
    problems = _problems(path, about or {}, everything=True)
    if problems is None:
        problems = _without_manifest(path)
    if problems:
        raise DamagedCheckpoint(problem_list(path, f"damaged, and nothing of it was loaded{fix}", problems))


def check_export(folder: Path) -> None:
    """Raises DataError, on every process, where files of an exported Hugging Face folder changed. Collective.

    Folders of other programs have no checksums. Files may be added, as long as they hold no weights.
    """
    problems = _problems(folder, {}, everything=False)
    if problems:
        raise DataError(problem_list(folder, f"damaged, and nothing of it was loaded; {COPY_AGAIN}", problems))


def _problems(folder: Path, about: Mapping[str, Any], *, everything: bool) -> list[str] | None:
    """None where there is no manifest. Collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    manifest: Manifest | str | None = None
    if rank == 0:
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError) as error:
            manifest = f"{MANIFEST_FILE}: damaged itself ({error})" if folder.is_dir() else f"{folder.name}: is gone"
    manifest = gather_objects(manifest)[0]
    if manifest is None or isinstance(manifest, str):
        return None if manifest is None else [manifest]
    parts = gather_objects(_told(lambda: damages(folder, manifest, share(manifest.files, rank, ranks))))
    names = gather_objects(_told(lambda: names_in(folder)) if rank == 0 else [])[0]
    for reader, part in enumerate([*parts, names]):
        if isinstance(part, str):  # of one process, not of the folder
            raise CheckpointError(f"{folder} cannot be read by process {reader % ranks} ({part}); give it a way to it")
    unseen = {problem for part in parts for problem in part if problem.endswith(": missing")}
    if any(problem.removesuffix(": missing") in names for problem in unseen):
        raise CheckpointError(
            f"{folder}: one process sees it whole, and another has {', '.join(sorted(unseen)[:3])}; put it where all "
            "processes see it"
        )
    problems = [problem for part in parts for problem in part]
    if rank == 0:
        added = [name for name in names if name not in manifest.files]
        added = [name for name in added if everything or name.endswith((".safetensors", ".safetensors.index.json"))]
        problems += [f"{name}: not part of it" for name in added]
        problems += [
            f"{key} is {manifest.about.get(key)} there and {value} here"
            for key, value in about.items()
            if None not in (value, manifest.about.get(key)) and manifest.about[key] != value
        ]
    problems = gather_objects(problems)[0]
    return problems


def _without_manifest(path: Path) -> list[str]:
    from gspo_moe.model.reading import load_common  # not above: it takes a second to import
    from gspo_moe.model.sharded import checkpoint_errors

    with checkpoint_errors(path, "loaded", COPY_AGAIN):
        marked = MARK in load_common(path)
    if marked:
        return [f"{MANIFEST_FILE}: missing"]
    if dist.get_rank() == 0:
        _log.warning("%s has no checksums, as versions before and other programs write none: it is not checked", path)
    return []
