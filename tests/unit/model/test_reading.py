"""A checkpoint that somebody was given runs nothing, and those of older versions and of megatron-core still load."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from gspo_moe.config.schema import Config
from gspo_moe.errors import CheckpointError
from gspo_moe.model.build import Model
from gspo_moe.model.reading import _read_metadata, load_common, load_tensors_metadata
from gspo_moe.model.sharded import load_stored_weights, stored_tensors
from gspo_moe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gspo_moe.training.optimizer import Optimizer
from tests.manifests import reseal
from tests.policy import trained
from tests.qwen3 import layout

BEFORE = Path(__file__).parents[2] / "runs_before/run/checkpoints/step_00000002"  # by megatron-core's own writer
Plant = Callable[[Path, Any], None]
Read = Callable[[Path, Model, Optimizer], object]


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, sign: Path) -> None:
        self._sign = sign

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._sign),)


def in_metadata(folder: Path, payload: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def within_metadata(folder: Path, payload: Any) -> None:
    """As a value of what is otherwise whole."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"more": payload}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(folder: Path, payload: Any) -> None:
    """In a file that megatron-core 0.19 reads where it is, though it writes none."""
    torch.save({"progress": {}, "more": payload}, folder / "common.pt")


def in_random_state(folder: Path, payload: Any) -> None:
    """In place of the generators' state: in a file of its own, which `.metadata` names."""
    data = io.BytesIO()
    torch.save([payload], data)
    (folder / "__9_9.distcp").write_bytes(data.getvalue())
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    names = {key for key, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    for index, place in metadata.storage_data.items():
        if index.fqn in names:
            place.relative_path, place.offset, place.length = "__9_9.distcp", 0, len(data.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def resume(folder: Path, model: Model, optimizer: Optimizer) -> object:
    return load_checkpoint(folder, model, optimizer)


def start(folder: Path, model: Model, optimizer: Optimizer) -> object:
    return load_stored_weights(model, folder)


def convert(folder: Path, model: Model, optimizer: Optimizer) -> object:
    return stored_tensors(folder)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("plant", "reads"),
    [
        (in_metadata, (resume, start, convert)),
        (within_metadata, (resume, start, convert)),
        (in_common, (resume, start)),
        (in_random_state, (resume,)),
    ],
)
def test_a_payload_does_not_run(
    plant: Plant, reads: tuple[Read, ...], forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sign = tmp_path / "it ran"
    with trained(Config(), layout()) as (model, optimizer):
        folder = save_checkpoint(tmp_path, model, optimizer, Progress(step=1), keep=1)
        plant(folder, Payload(sign))
        reseal(folder)
        for read in reads:
            with pytest.raises(CheckpointError, match=f"{folder.name} cannot be loaded"):
                read(folder, model, optimizer)
            assert not sign.exists()
    if plant is in_metadata:
        pickle.loads((folder / ".metadata").read_bytes())
        assert sign.exists(), "the payload is one"


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "..", ""])
def test_no_file_outside_the_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(BEFORE, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"a file outside of it"):
        load_tensors_metadata(folder)


def test_what_megatrons_own_writer_wrote_is_read_as_torch_reads_it() -> None:
    readers = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    found = load_tensors_metadata(BEFORE)
    expected = FileSystemReader(BEFORE).read_metadata().state_dict_metadata
    tensors = {name: kind for name, kind in expected.items() if not isinstance(kind, BytesStorageMetadata)}
    assert {name: (torch.Size(each.global_shape), each.dtype) for name, each in found.items()} == {
        name: (kind.size, kind.properties.dtype) for name, kind in tensors.items()
    }
    assert load_common(BEFORE)["progress"]["step"] == 2
    assert (FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes) == readers


def test_a_metadata_that_changes_what_it_names_is_refused_and_undone(tmp_path: Path) -> None:
    """(None, {...}) as the state of a class sets its attributes."""
    for kind, words in ((metadata.Metadata, "Metadata"), (metadata._MEM_FORMAT_ENCODING, "_MEM_FORMAT_ENCODING")):
        before = dict(vars(kind))
        payload = b"\x80\x02c" + kind.__module__.encode() + b"\n" + kind.__name__.encode() + b"\n"
        payload += b"(N}X\x06\x00\x00\x00broken" + b"X\x03\x00\x00\x00yes" + b"stb."
        (tmp_path / ".metadata").write_bytes(payload)
        with pytest.raises(CheckpointError, match=f"sets attributes of {words}"):
            _read_metadata(FileSystemReader(tmp_path))
        assert dict(vars(kind)) == before
