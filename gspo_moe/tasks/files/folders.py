"""Which files a path means: a file, a folder of files, or a data-set folder that Hugging Face's `datasets` wrote.

Of the latter there are two layouts: that of `save_to_disk` (state.json beside .arrow files, dataset_dict.json above
splits) and a clone of the hub's repository (`data/train-00000-of-00002.parquet`, `train.jsonl`, README.md).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gspo_moe.config.data import DataFile
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.plain_json import read_object
from gspo_moe.tasks.files.tables import ARROW, SUFFIXES

STATE, SPLITS = "state.json", "dataset_dict.json"
OF_DATASETS = {STATE, SPLITS, "dataset_info.json", "dataset_infos.json"}  # .json files that hold no records
SHARD = re.compile(r"^(?P<split>.+?)-\d+-of-\d+$")
# The words by which the hub finds a split in a file's or folder's name.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HELD_OUT = ("validation", "test")
BY_DEFAULT = {"train": ("train",), "sft": ("train",), "eval": HELD_OUT}


def files_of(file: DataFile, split: str, key: str) -> list[Path]:
    """In order; of a folder with several splits those of `file.split`, else of the one that goes with `split`.

    key: what the config calls it. Raises ConfigError for a path without files, and where the split is not there, or
    not clear.
    """
    path = Path(file.path)
    if not path.exists():
        raise ConfigError(f"{key}={path} does not exist; give a file of records, or a folder with some")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{key}={path} is none of {', '.join(SUFFIXES)}; convert it, or name it so")
        if file.split is not None:
            raise ConfigError(f"{key}: split={file.split} is of folders and {path} is a file; leave it out")
        return [path]
    if (path / SPLITS).is_file():
        names = _read(path / SPLITS).get("splits", [])
        found = {str(name): _saved(path / str(name)) for name in names}
    elif (path / STATE).is_file():
        if file.split is not None:
            raise ConfigError(f"{key}: {path} is one split of a data set; leave split={file.split} out")
        return _saved(path)
    else:
        found = _by_name(path)
    if not any(found.values()):
        raise ConfigError(f"{key}={path} is a folder without {', '.join(SUFFIXES)} files; give one that has some")
    return _chosen(found, file, split, key)


def _chosen(found: dict[str, list[Path]], file: DataFile, split: str, key: str) -> list[Path]:
    if file.split is not None:
        if file.split not in found:
            raise ConfigError(f"{key}: {file.path} has no split {file.split!r}; it has {', '.join(found)}")
        return found[file.split]
    only = next(iter(found)) if len(found) == 1 else None
    if only is not None and (split == "eval" or only not in HELD_OUT):
        return found[only]
    fitting = [name for name in BY_DEFAULT[split] if name in found]
    if len(fitting) != 1:
        reason = f"has no split {BY_DEFAULT[split][0]!r}" if not fitting else "has more than one split that would do"
        raise ConfigError(
            f"{key}: {file.path} {reason}; it has {', '.join(found)}: set {key} to {{path: {file.path}, split: NAME}}"
        )
    return found[fitting[0]]


def _saved(folder: Path) -> list[Path]:
    """In the order in which `save_to_disk` numbered them."""
    if not (folder / STATE).is_file():
        raise DataError(f"{folder} lacks {STATE}; save the data set again with save_to_disk")
    state = _read(folder / STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} was saved with an index over its rows; call flatten_indices() and save it again")
    return [folder / str(one["filename"]) for one in state.get("_data_files", [])]


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """By split where names tell any, else all as the split train."""
    files = sorted(
        one
        for one in folder.rglob("*")
        if one.suffix in SUFFIXES and one.suffix != ARROW and one.name not in OF_DATASETS and _is_open(one, folder)
    )
    found = dict[str, list[Path]]()
    for one in files:
        found.setdefault(_split_of(one, folder) or "", []).append(one)
    unnamed = found.pop("", [])
    if unnamed:
        found["train"] = sorted(found.get("train", []) + unnamed)
    return found


def _is_open(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _split_of(file: Path, folder: Path) -> str | None:
    shard = SHARD.match(file.stem)
    if shard:
        return _known(shard["split"]) or shard["split"]
    names = [file.stem, *reversed(file.relative_to(folder).parent.parts)]
    return next((split for split in map(_known, names) if split is not None), None)


def _known(name: str) -> str | None:
    """A whole word of the name, digits behind it apart, is a split's."""
    words = [word.rstrip("0123456789") for word in re.split(r"[^0-9a-z]+", name.lower())]
    return next((split for split, known in WORDS.items() if any(word in known for word in words)), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}); save the data set again") from error
