"""Random damages to a run's checkpoints: each is named before anything is loaded, and none is silent."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from gspo_moe.config.checkpoints import checkpoints, newest_checkpoint
from gspo_moe.config.schema import Config
from gspo_moe.errors import CheckpointError, DamagedCheckpoint, DataError
from gspo_moe.manifest import MANIFEST_FILE, crc32
from gspo_moe.model.build import Model
from gspo_moe.model.hf import export_hf
from gspo_moe.model.initial import load_hf
from gspo_moe.model.sharded import load_stored_weights
from gspo_moe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.resuming import load_newest
from tests.policy import trained
from tests.qwen3 import layout

RUN, OTHER = "a" * 32, "b" * 32
DONE = Progress(step=2, policy_version=4)


@dataclass(frozen=True)
class Place:
    """A run's checkpoint to be damaged, its own older one, another run's of the same step, and files of an export."""

    newest: Path
    older: Path
    foreign: Path
    export: Path


def some_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def flip_bits(folder: Path, place: Place, draw: random.Random) -> None:
    file, count = some_file(folder, draw), draw.choice((1, 1, 1, 8))
    content = bytearray(file.read_bytes())
    for bit in draw.sample(range(8 * len(content)), count):
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(folder: Path, place: Place, draw: random.Random) -> None:
    file = some_file(folder, draw)
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def append(folder: Path, place: Place, draw: random.Random) -> None:
    with some_file(folder, draw).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 100)))


def zero_block(folder: Path, place: Place, draw: random.Random) -> None:
    file = draw.choice(sorted(file for file in folder.iterdir() if file.stat().st_size > 64))
    content = bytearray(file.read_bytes())
    length = min(len(content), draw.choice((16, 512, 4096)))
    start = draw.randrange(len(content) - length + 1)
    content[start : start + length] = bytes(length)
    if content == file.read_bytes():  # was zero
        content[start : start + length] = b"\xff" * length
    file.write_bytes(content)


def delete(folder: Path, place: Place, draw: random.Random) -> None:
    some_file(folder, draw).unlink()


def add(folder: Path, place: Place, draw: random.Random) -> None:
    source = draw.choice(sorted(place.foreign.glob("*.distcp")) + sorted(place.export.glob("*.safetensors")))
    shutil.copy(source, folder / f"{draw.choice(('__3_0', '__0_7', 'model'))}{source.suffix}")


def swap_in(folder: Path, place: Place, draw: random.Random) -> None:
    """A file of another run's checkpoint, or of an older one, that differs."""
    other = draw.choice((place.foreign, place.older))
    differing = [
        file
        for file in sorted(folder.iterdir())
        if (other / file.name).is_file() and (other / file.name).read_bytes() != file.read_bytes()
    ]
    file = draw.choice(differing)
    shutil.copy(other / file.name, file)


def swap_names(folder: Path, place: Place, draw: random.Random) -> None:
    one, two = draw.sample(sorted(folder.iterdir()), 2)
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)


def whole_other(folder: Path, place: Place, draw: random.Random) -> None:
    shutil.rmtree(folder)
    shutil.copytree(draw.choice((place.foreign, place.older)), folder)


def link(folder: Path, place: Place, draw: random.Random) -> None:
    elsewhere = folder.with_name("elsewhere")
    target = draw.choice((elsewhere, place.older, place.foreign, folder.with_name("nowhere")))
    folder.rename(elsewhere)
    folder.symlink_to(target, target_is_directory=True)


def file_to_folder(folder: Path, place: Place, draw: random.Random) -> None:
    file = some_file(folder, draw)
    file.unlink()
    file.mkdir()


Damage = Callable[[Path, Place, random.Random], None]
DAMAGES: tuple[Damage, ...] = (
    *(flip_bits, flip_bits, flip_bits, truncate, append, zero_block, delete, add),
    *(swap_in, swap_names, whole_other, link, file_to_folder),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Model, Optimizer]]:
    folder = tmp_path_factory.mktemp("damage")
    with trained(Config(), layout()) as (model, optimizer):
        older = save_checkpoint(folder / "run", model, optimizer, replace(DONE, step=1), keep=2, run=RUN)
        newest = save_checkpoint(folder / "run", model, optimizer, DONE, keep=2, run=RUN)
        weight = model.gpt_chunks[0].decoder.final_layernorm.weight
        with torch.no_grad():
            weight.add_(1)
        foreign = save_checkpoint(folder / "other", model, optimizer, DONE, keep=2, run=OTHER)
        with torch.no_grad():
            weight.sub_(1)
        export_hf(model, folder / "hf", max_shard_bytes=100_000)
        yield Place(newest, older, foreign, folder / "hf"), model, optimizer


def numbers(model: Model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.gpt_chunks[0].parameters()]


def silent_damages(place: Place, model: Model, optimizer: Optimizer, seeds: range, scratch: Path) -> list[str]:
    """Which seeds' damages a start did not tell of, or only after it had loaded something."""
    before, found = numbers(model), []
    for seed in seeds:
        draw = random.Random(seed)
        copy = scratch / str(seed) / place.newest.name
        shutil.copytree(place.newest, copy)
        damage = DAMAGES[seed % len(DAMAGES)]
        damage(copy, place, draw)
        try:
            load_newest(copy.parent, model, optimizer, RUN, "error")
            found.append(f"{seed} {damage.__name__}: silent")
        except CheckpointError as error:
            if "delete" in str(error).lower() or str(copy) not in str(error):
                found.append(f"{seed} {damage.__name__}: {error}")
        if not all(map(torch.equal, before, numbers(model))):
            found.append(f"{seed} {damage.__name__}: something was loaded")
        shutil.rmtree(scratch / str(seed))
    return found


def test_no_damage_is_silent(place: tuple[Place, Model, Optimizer], tmp_path: Path) -> None:
    assert silent_damages(*place, range(2 * len(DAMAGES)), tmp_path) == []


@pytest.mark.slow
def test_no_damage_of_many_is_silent(place: tuple[Place, Model, Optimizer], tmp_path: Path) -> None:
    assert silent_damages(*place, range(1000, 1000 + 100 * len(DAMAGES)), tmp_path) == []


def test_what_is_wrong_is_named_all_at_once(place: tuple[Place, Model, Optimizer], tmp_path: Path) -> None:
    where, model, optimizer = place
    copy = tmp_path / where.newest.name
    shutil.copytree(where.newest, copy)
    flipped = bytearray((copy / "__0_0.distcp").read_bytes())
    flipped[1000] ^= 4
    (copy / "__0_0.distcp").write_bytes(flipped)
    (copy / ".metadata").unlink()
    for harmless in (".DS_Store", "tokenizer.json"):
        (copy / harmless).write_bytes(b"1")
    (copy / "__1_0.distcp").touch()
    with pytest.raises(DamagedCheckpoint) as caught:
        load_checkpoint(copy, model, optimizer, OTHER)
    assert str(caught.value).splitlines() == [
        f"{copy}: damaged, and nothing of it was loaded",
        "  .metadata: missing",
        f"  __0_0.distcp: its {len(flipped)} bytes are not those that were written",
        "  __1_0.distcp: not part of it",
        f"  run is {RUN} there and {OTHER} here",
    ]
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: missing"):
        load_stored_weights(model, copy)


def test_the_one_before_is_taken_where_the_config_allows(
    place: tuple[Place, Model, Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where, model, optimizer = place
    for each in (where.older, where.newest):
        shutil.copytree(each, tmp_path / each.name)
    newest = tmp_path / where.newest.name
    (newest / "config.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"go on from step_00000001 with checkpoint\.on_damage=previous"):
        load_newest(tmp_path, model, optimizer, RUN, "error")
    assert newest_checkpoint(tmp_path) == newest
    with caplog.at_level(logging.WARNING):
        assert load_newest(tmp_path, model, optimizer, RUN, "previous").step == 1
    assert f"moved to {newest}.damaged, and the run goes on from {tmp_path / where.older.name}" in caplog.text
    assert [path.name for path in checkpoints(tmp_path)] == [where.older.name]
    assert (tmp_path / f"{newest.name}.damaged" / "__0_0.distcp").is_file()
    save_checkpoint(tmp_path, model, optimizer, DONE, keep=1, run=RUN)
    assert (tmp_path / f"{newest.name}.damaged").is_dir(), "what was moved aside stays"
    (newest / "config.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="There is none before it"):
        load_newest(tmp_path, model, optimizer, RUN, "previous")
    assert newest_checkpoint(tmp_path) == newest


def test_a_damaged_one_that_cannot_be_moved_ends_the_start(
    place: tuple[Place, Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, model, optimizer = place
    for each in (where.older, where.newest):
        shutil.copytree(each, tmp_path / each.name)
    (tmp_path / where.newest.name / "config.json").unlink()

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(DamagedCheckpoint, match=r"config\.json: missing\nIt cannot be moved aside \(Read-only file"):
        load_newest(tmp_path, model, optimizer, RUN, "previous")


def test_a_copy_that_broke_off_is_damaged(place: tuple[Place, Model, Optimizer], tmp_path: Path) -> None:
    """Whatever it had come to, as `cp -r` goes by the names."""
    where, model, optimizer = place
    names = sorted(path.name for path in where.newest.iterdir())
    for count in range(1, len(names)):
        copy = tmp_path / where.newest.name
        copy.mkdir()
        for name in names[:count]:
            shutil.copy(where.newest / name, copy / name)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(copy, model, optimizer, RUN)
        shutil.rmtree(copy)


def test_a_damaged_export_is_named_and_one_without_checksums_is_read(
    place: tuple[Place, Model, Optimizer], tmp_path: Path
) -> None:
    where, model, _ = place
    folder = tmp_path / "hf"
    shutil.copytree(where.export, folder)
    (folder / "README.md").write_text("added")
    load_hf(model, folder)
    draw, names = random.Random(0), sorted(path.name for path in where.export.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for name in names:
        content = bytearray((folder / name).read_bytes())
        place_of_flip = draw.randrange(len(content))
        content[place_of_flip] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=f"hf: damaged.*where you changed it yourself, remove .*\n  {name}"):
            load_hf(model, folder)
        shutil.copy(where.export / name, folder / name)
    shutil.copy(min(folder.glob("*.safetensors")), folder / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors: not part of it"):
        load_hf(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / MANIFEST_FILE).unlink()
    load_hf(model, folder)


def test_the_checksum_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")
    assert crc32(tmp_path / "file") == 0xCBF43926  # CRC-32/ISO-HDLC's check value
