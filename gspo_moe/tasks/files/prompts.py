"""The prompts of `task.data`: files are read where a prompt is first asked for, and no reward worker asks."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from random import Random
from typing import Self

from gspo_moe.config.data import DataConfig, DataFile
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks.files.formats import Demonstration
from gspo_moe.tasks.files.order import Order
from gspo_moe.tasks.files.reader import Reader
from gspo_moe.types import Prompt

EPOCH = re.compile(r"/epoch\d+$")
SPLITS = ("train", "eval", "sft")


@dataclass(frozen=True)
class Entry:
    """Where a record stands: numbers of the file in the config, of the table in it, and of the row."""

    file: int
    table: int
    row: int
    uid: str


class Records:
    """All records of one key of `task.data`, every one of which has been read once.

    skipped: what is wrong with those that are left out, by `task.data.on_bad_record`.
    Raises DataError for a bad record unless these are left out, for two of one uid, and where none is left.
    """

    def __init__(self, data: DataConfig, split: str) -> None:
        self._key = f"task.data.{split}"
        self.readers = [Reader(file, data, split, self._key) for file in getattr(data, split)]
        self.skipped: list[str] = []
        self.entries: list[Entry] = []
        self.contents: list[bytes] = []  # digests of the prompts
        self._read_all(skips=data.on_bad_record == "skip")

    def prompt(self, number: int) -> Prompt:
        """Its uid is the record's own, else file and row."""
        entry = self.entries[number]
        prompt = self.readers[entry.file].read(entry.table, entry.row).prompt
        return replace(prompt, uid=entry.uid)

    def demonstration(self, number: int) -> Demonstration:
        entry = self.entries[number]
        return self.readers[entry.file].demonstration(entry.table, entry.row)

    def place(self, number: int) -> str:
        entry = self.entries[number]
        return self.readers[entry.file].tables[entry.table].place(entry.row)

    @cached_property
    def by_uid(self) -> dict[str, int]:
        return {entry.uid: number for number, entry in enumerate(self.entries)}

    def _read_all(self, skips: bool) -> None:
        first = dict[str, str]()
        for file, reader in enumerate(self.readers):
            names = self._names(file)
            for table, row in reader.rows():
                place = reader.tables[table].place(row)
                try:
                    prompt = reader.read(table, row).prompt
                except DataError as error:
                    if not skips:
                        raise DataError(f"{place}: {error}; mend it, or set task.data.on_bad_record=skip") from None
                    self.skipped.append(f"{place}: {error}")
                    continue
                uid = prompt.uid or f"{names[table]}/{row + 1}"
                if uid in first:
                    raise DataError(
                        f"{place} has the uid {uid}, as {first[uid]} has; give each record its own, or name another "
                        "column: task.data.columns.uid=NAME"
                    )
                first[uid] = place
                self.entries.append(Entry(file, table, row, uid))
                said = (prompt.text, *((one.role, one.content) for one in prompt.messages))
                self.contents.append(blake2b(repr(said).encode(errors="surrogatepass"), digest_size=16).digest())
        if self.readers and not self.entries:
            raise DataError(f"{self._key}: no record can be read, the first is {self.skipped[0]}; mend the file")

    def _names(self, file: int) -> list[str]:
        """Of a file's tables, by which uids call them; of several that are called alike, numbered ones."""
        taken = [table.path.stem for reader in self.readers[:file] for table in reader.tables]
        names = []
        for table in self.readers[file].tables:
            taken.append(table.path.stem)
            count = taken.count(table.path.stem)
            names.append(table.path.stem if count == 1 else f"{table.path.stem}~{count}")
        return names


class FilePrompts:
    """Prompts by number, in the order of the files; `at` says in which order training takes them."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        self._data, self._seed = data, seed
        self._records: dict[str, Records] = {}
        self._numbers: dict[str, list[int]] = {}  # of a split's prompts, in its records
        self._orders: dict[str, Order] = {}

    def prompt(self, split: str, index: int) -> Prompt:
        """Raises ConfigError where there is none, DataError for files that cannot be read."""
        numbers = self._of(split)
        if not 0 <= index < len(numbers):
            raise ConfigError(
                f"task.data has {len(numbers)} prompts in its split {split!r}, and none of number {index}"
            )
        prompt = self._read(split).prompt(numbers[index])
        return replace(prompt, uid=f"{split}/{prompt.uid}")

    def size(self, split: str) -> int:
        return len(self._of(split))

    def at(self, split: str, place: int) -> tuple[int, int]:
        """(epoch, index) at a place of training's endless order."""
        if split not in self._orders:
            entries = self._read(split).entries
            of_file = [entries[number].file for number in self._of(split)]
            weights = [file.weight for file in self._files(split) if file.weight is not None and split != "eval"]
            sizes = [of_file.count(file) for file in range(len(self._files(split)))]
            empty = [self._files(split)[file].path for file, size in enumerate(sizes) if weights and not size]
            if empty:
                raise ConfigError(
                    f"task.data: no prompt of {empty[0]} is left to have its weight's share; leave it out"
                )
            self._orders[split] = Order(sizes, weights, f"{self._seed}/{split}" if self._data.shuffle else None)
        return self._orders[split].at(place)

    def where(self, split: str, index: int) -> str:
        """File and line of a prompt."""
        return self._read(split).place(self._of(split)[index])

    def skipped(self, split: str) -> Sequence[str]:
        """What was wrong with the records of the split's files that are left out."""
        return self._read(split).skipped

    def kept(self, split: str, indices: Sequence[int]) -> Self:
        """The same without the split's other prompts."""
        fewer = copy.copy(self)
        numbers = self._of(split)
        fewer._numbers = {**self._numbers, split: [numbers[index] for index in indices]}
        fewer._orders = {name: order for name, order in self._orders.items() if name != split}
        return fewer

    def demonstration(self, prompt: Prompt) -> Demonstration:
        """Raises ConfigError where the record has none."""
        split, _, own = EPOCH.sub("", prompt.uid).partition("/")
        records = self._read(split)
        return records.demonstration(records.by_uid[own])

    def _files(self, split: str) -> Sequence[DataFile]:
        files: Sequence[DataFile] = getattr(self._data, self._key(split))
        return files

    def _key(self, split: str) -> str:
        """Of `task.data`, the one whose files the split's records are in."""
        if split not in SPLITS:
            raise ConfigError(f"unknown split {split!r} of task.data; use one of {', '.join(SPLITS)}")
        if getattr(self._data, split) or split == "train" or (split == "eval" and not self._data.held_out):
            return split
        return "train"

    def _read(self, split: str) -> Records:
        key = self._key(split)
        if key not in self._records:
            self._records[key] = Records(self._data, key)
        return self._records[key]

    def _of(self, split: str) -> list[int]:
        if split not in self._numbers:
            records = self._read(split)
            self._numbers[split] = list(range(len(records.entries)))
            if self._data.held_out and self._key(split) == "train":
                held_out = self._held_out(records)
                left = [number for number, content in enumerate(records.contents) if content not in held_out]
                self._numbers[split] = sorted(held_out.values()) if split == "eval" else left
        return self._numbers[split]

    def _held_out(self, records: Records) -> dict[bytes, int]:
        """By content: what is the same word for word as one that is held out is not trained on either."""
        different, count = dict[bytes, int](), self._data.held_out
        for number, content in enumerate(records.contents):
            different.setdefault(content, number)
        if count >= len(different):
            raise ConfigError(
                f"task.data.held_out={count} leaves none of the {len(different)} different prompts of task.data.train "
                "to train on; lower it"
            )
        return dict(Random(f"{self._seed}/held_out").sample(list(different.items()), count))
