"""Checkpoints of one process; several are in tests/distributed/test_policy_layouts.py."""

import errno
import io
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gspo_moe.config.checkpoints import checkpoints, newest_checkpoint
from gspo_moe.config.rope import Yarn
from gspo_moe.config.schema import Config
from gspo_moe.errors import CheckpointError, SaveError
from gspo_moe.files import no_room
from gspo_moe.manifest import read_manifest
from gspo_moe.model import writing
from gspo_moe.model.build import Model
from gspo_moe.model.reading import dist_checkpointing
from gspo_moe.model.sharded import weight_shards
from gspo_moe.model.weights import RandomSource, load_weights
from gspo_moe.training.checkpoint import (
    Destination,
    Progress,
    begin_save,
    load_checkpoint,
    save_checkpoint,
    tensor_parallel,
)
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.types import TrainingSample
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import architecture, layout, random_sequences
from tests.steps import train_supervised

DONE = Progress(step=1, prompt_position=96, policy_version=2, prompts_pending=(90, 95))
KINDS = [
    {},
    {"parallel": {"distributed_optimizer": True}},
    {"model": {"preset": "tiny", "dtype": "bf16"}},
    {"model": {"preset": "tiny", "dtype": "bf16"}, "parallel": {"distributed_optimizer": True}},
]


def configured(**more: Any) -> Config:
    optimizer = {"lr": 1e-2, "decay": "linear", "warmup_updates": 3, "weight_decay": 0.1}
    return Config.model_validate({"optimizer": optimizer, **more})


def learn(model: Model, optimizer: Optimizer, updates: int) -> list[tuple[float, Any]]:
    """Takes updates on data of their own; loss, norm and learning rate of each."""
    samples = [
        TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1))
        for ids in random_sequences(SIZES, (5, 9, 7), seed=10)
    ]
    found = []
    for _ in range(updates):
        statistics, update = train_supervised(model, optimizer, packs_of(samples, per_pack=2), num_tokens=18)
        found.append((statistics.to_metrics()["sft/loss"], update))
    return found


def state(model: Model, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Every number that training goes on from, by name."""
    found = {f"weight {name}": value for name, value in model.gpt_chunks[0].named_parameters()}
    for index, part in enumerate(optimizer.megatron.chained_optimizers):
        for group in part.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                name = f"optimizer {index} {group['wd_mult']} {number}"
                found[f"{name} main weight"] = parameter
                found |= {f"{name} {key}": value for key, value in part.optimizer.state[parameter].items()}
    found["rng"] = torch.get_rng_state()
    for name, value in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        found[f"rng {name}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


def shards(model: Model, optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Adam's state by the names under which it is stored, each stacked tensor's part by its place."""
    found = optimizer.shards(weight_shards(model), loading=False)
    return {
        number: {f"{shard.key} {getattr(shard, 'global_offset', '')}": shard.data.clone() for shard in part.values()}
        for number, part in found.items()
    }


def scramble(model: Model, optimizer: Optimizer) -> None:
    """Another model, optimizer and generator state."""
    load_weights(model, RandomSource(SIZES, seed=77))
    learn(model, optimizer, updates=1)
    torch.manual_seed(77)
    tensor_parallel.get_cuda_rng_tracker().reset()
    tensor_parallel.get_cuda_rng_tracker().add("model-parallel-rng", 77)


@pytest.fixture
def policy() -> Iterator[tuple[Model, Optimizer]]:
    with trained(configured(), layout()) as (model, optimizer):
        learn(model, optimizer, updates=1)
        yield model, optimizer


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind: dict[str, Any], used_before: bool, tmp_path: Path) -> None:
    config = configured(**kind)
    with trained(config, layout()) as (model, optimizer):
        learn(model, optimizer, updates=2)
        torch.rand(5)
        path = save_checkpoint(tmp_path, model, optimizer, DONE, keep=1)
        saved = state(model, optimizer)
        expected = learn(model, optimizer, updates=4)
        end = state(model, optimizer)
    with trained(config, layout(), source=RandomSource(SIZES, seed=5)) as (model, optimizer):
        if used_before:
            scramble(model, optimizer)
        assert load_checkpoint(path, model, optimizer) == DONE
        loaded = state(model, optimizer)
        assert loaded.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []
        assert {loaded[name].item() for name in loaded if name.endswith(" step")} == {2}
        assert learn(model, optimizer, updates=4) == expected
        assert [name for name, value in state(model, optimizer).items() if not torch.equal(value, end[name])] == []


@pytest.mark.parametrize("distributed", [False, True])
def test_routers_may_be_frozen_from_a_checkpoint_on(distributed: bool, tmp_path: Path) -> None:
    """The other way round there is no state to go on from; `plan.check_continues` refuses it."""
    parallel = {"distributed_optimizer": distributed}
    with trained(configured(parallel=parallel), layout()) as (model, optimizer):
        learn(model, optimizer, updates=2)
        path = save_checkpoint(tmp_path, model, optimizer, DONE, keep=1)
        saved = {name: value.detach().clone() for name, value in model.gpt_chunks[0].named_parameters()}
        moments = {name: value for part in shards(model, optimizer).values() for name, value in part.items()}
    frozen = configured(parallel=parallel, routing={"frozen_router": True})
    with trained(frozen, layout(), source=RandomSource(SIZES, seed=5)) as (model, optimizer):
        assert load_checkpoint(path, model, optimizer) == DONE
        weights = dict(model.gpt_chunks[0].named_parameters())
        assert [name for name, value in saved.items() if not torch.equal(weights[name], value)] == []
        kept = {name: value for part in shards(model, optimizer).values() for name, value in part.items()}
        assert len(moments) - len(kept) == 2 * sum(".router." in name for name in saved)
        assert [name for name, value in kept.items() if not torch.equal(moments[name], value)] == []
        learn(model, optimizer, updates=1)
        still = {name for name, value in weights.items() if torch.equal(value, saved[name])}
    assert still == {name for name in saved if ".router." in name}


def test_loading_leaves_the_configurations_settings(tmp_path: Path) -> None:
    with trained(configured(), layout()) as (model, optimizer):
        learn(model, optimizer, updates=2)
        path = save_checkpoint(tmp_path, model, optimizer, DONE, keep=1)
    other = {"lr": 5e-3, "beta1": 0.5, "eps": 1e-4, "weight_decay": 0.3, "warmup_updates": 0, "decay": "constant"}
    with trained(Config.model_validate({"optimizer": other}), layout()) as (model, optimizer):
        load_checkpoint(path, model, optimizer)
        assert [update.learning_rate for _, update in learn(model, optimizer, updates=2)] == [5e-3, 5e-3]
        for group in optimizer.megatron.param_groups:
            assert (group["betas"], group["eps"]) == ((0.5, 0.95), 1e-4)
            assert group["weight_decay"] == 0.3 * group["wd_mult"]


def test_only_the_newest_checkpoints_stay(policy: tuple[Model, Optimizer], tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, *policy, replace(DONE, step=step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step_00000100"
    assert load_checkpoint(newest, *policy).step == 100


def test_a_removal_that_breaks_off_leaves_nothing_that_counts(
    policy: tuple[Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_off(path: Path) -> None:
        (path / "__0_0.distcp").unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_checkpoint(tmp_path, *policy, DONE, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr("gspo_moe.config.checkpoints.shutil", SimpleNamespace(rmtree=broken_off))
        save_checkpoint(tmp_path, *policy, replace(DONE, step=2), keep=1)
    assert "step_00000001 cannot be removed" in caplog.text
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]
    save_checkpoint(tmp_path, *policy, replace(DONE, step=3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_every_so_many_steps_stay_as_well(policy: tuple[Model, Optimizer], tmp_path: Path) -> None:
    place = Destination(tmp_path, keep=2, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        begin_save(place, *policy, replace(DONE, step=step)).finish()
    assert [path.name[-2:] for path in sorted(tmp_path.iterdir())] == ["04", "08", "10"]


def test_a_save_in_the_background_is_of_the_state_where_it_began(
    policy: tuple[Model, Optimizer], tmp_path: Path
) -> None:
    """Whatever training does before it is written; a kill meanwhile leaves the one before."""
    place = Destination(tmp_path / "behind", keep=1)
    first = begin_save(place, *policy, DONE).finish()
    at_once = save_checkpoint(tmp_path / "at_once", *policy, replace(DONE, step=2), keep=1)
    begun = begin_save(place, *policy, replace(DONE, step=2), background=True)
    learn(*policy, updates=1)
    assert newest_checkpoint(place.folder) == first
    written = begun.finish()
    assert [path.name for path in place.folder.iterdir()] == ["step_00000002"]
    one, other = (read_manifest(path) for path in (at_once, written))
    assert one is not None
    assert other is not None
    # But for an identifier that torch draws for each save.
    assert {**one.files, ".metadata": None} == {**other.files, ".metadata": None}
    found, expected = (tensors_and_objects(path) for path in (written, at_once))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_writer_that_never_ends_is_a_save_that_failed(
    policy: tuple[Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(FileSystemWriter, "write_data", lambda *_: ended.wait(60))
        begun = begin_save(Destination(tmp_path, keep=1, patience=0.1), *policy, DONE, background=True)
        assert begun.is_writing
        with pytest.raises(SaveError, match=r"step_00000001 could not be written \(its writer was not done 0\.1 s"):
            begun.finish()
        ended.set()
    assert list(tmp_path.iterdir()) == []


def test_what_no_run_wrote_neither_counts_nor_goes(policy: tuple[Model, Optimizer], tmp_path: Path) -> None:
    for name in ("step_00000001_best", "mine.partial", "step_00000002.partial"):
        (tmp_path / name).mkdir()
    for name in ("step_notes.txt", "step_0.log"):
        (tmp_path / name).write_text("good one")
    for step in (2, 3):
        written = save_checkpoint(tmp_path, *policy, replace(DONE, step=step), keep=1)
    kept = {"mine.partial", "step_00000001_best", "step_00000003", "step_0.log", "step_notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert newest_checkpoint(tmp_path) == written


def test_an_interrupted_save_leaves_the_checkpoint_before(
    policy: tuple[Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_checkpoint(tmp_path, *policy, DONE, keep=1)
    before = state(*policy)
    learn(*policy, updates=1)

    def interrupted(writer: FileSystemWriter, *_: Any) -> None:
        (Path(writer.path) / "__0_0.distcp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", interrupted)
    with pytest.raises(SaveError, match=r"step_00000002 could not be written .*No space left"):
        save_checkpoint(tmp_path, *policy, replace(DONE, step=2), keep=1)
    monkeypatch.setattr(FileSystemWriter, "write_data", whole)
    assert newest_checkpoint(tmp_path) == saved
    assert not (tmp_path / "step_00000002.partial").exists(), "a full disk gets its room back"
    (tmp_path / "step_00000002.partial").mkdir()  # as a killed process leaves it
    assert load_checkpoint(saved, *policy) == DONE
    assert all(torch.equal(value, before[name]) for name, value in state(*policy).items())
    save_checkpoint(tmp_path, *policy, replace(DONE, step=3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_another_architecture_is_refused_before_anything_is_read(
    policy: tuple[Model, Optimizer], tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, *policy, DONE, keep=1)
    model, optimizer = policy
    other = replace(model, architecture=architecture(num_experts=16, rope_theta=5.0, initializer_range=0.25))
    before = state(model, optimizer)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, other, optimizer)
    assert "num_experts is 8 there and 16 here; rope_theta is 10000.0 there and 5.0 here" in str(caught.value)
    assert "give another logging.run_dir or the same model" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model, optimizer).items())


def test_a_model_with_yarn_is_resumed_and_one_with_other_yarn_is_not(
    policy: tuple[Model, Optimizer], tmp_path: Path
) -> None:
    model, optimizer = policy
    scaled, other = (
        replace(
            model,
            architecture=SIZES.model_copy(
                update={"rope_scaling": Yarn(factor=factor, original_max_position_embeddings=32)}
            ),
        )
        for factor in (4.0, 2.0)
    )
    path = save_checkpoint(tmp_path, scaled, optimizer, DONE, keep=1)
    assert load_checkpoint(path, scaled, optimizer) == DONE
    with pytest.raises(
        CheckpointError, match=r"rope_scaling is \{.*'factor': 4\.0.* there and \{.*'factor': 2\.0.* here"
    ):
        load_checkpoint(path, other, optimizer)


@pytest.mark.parametrize("kept", [0.0, 0.5, None])
def test_damaged_files_are_a_checkpoint_error(
    kept: float | None, policy: tuple[Model, Optimizer], tmp_path: Path
) -> None:
    whole = save_checkpoint(tmp_path, *policy, DONE, keep=1)
    files = sorted(path.name for path in whole.iterdir())
    assert ".metadata" in files
    for file in files:
        damaged = tmp_path / "copy"
        shutil.copytree(whole, damaged)
        content = (damaged / file).read_bytes()
        (damaged / file).unlink()
        if kept is not None:
            (damaged / file).write_bytes(content[: int(kept * len(content))])
        with pytest.raises(CheckpointError, match="damaged, and nothing of it was loaded"):
            load_checkpoint(damaged, *policy)
        shutil.rmtree(damaged)


def test_a_checkpoint_of_another_program_is_refused(policy: tuple[Model, Optimizer], tmp_path: Path) -> None:
    dist_checkpointing.save({"iteration": 7}, str(tmp_path))
    with pytest.raises(CheckpointError, match="was not written by gspo_moe; give another logging"):
        load_checkpoint(tmp_path, *policy)


def test_a_save_starts_no_process_and_leaves_one_file_a_rank(
    policy: tuple[Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a save started a process")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)
    monkeypatch.setattr(os, "fork", refused)
    saved = save_checkpoint(tmp_path, *policy, DONE, keep=1)
    assert {path.name for path in saved.glob("*.distcp")} == {"__0_0.distcp"}


def test_what_is_stored_is_what_megatrons_own_writer_stores(
    policy: tuple[Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, shapes, pieces and dtypes as its metadata gives them, and the bytes of every object and tensor."""
    begin, theirs = writing.begin_state, tmp_path / "theirs"
    theirs.mkdir()

    def both(folder: Path, state: dict[str, Any], *, copied: bool) -> writing.Writing:
        begun = begin(folder, state, copied=copied)
        dist_checkpointing.save(state, str(theirs))
        return begun

    monkeypatch.setattr(writing, "begin_state", both)
    ours = save_checkpoint(tmp_path / "ours", *policy, DONE, keep=1)
    one, other = (FileSystemReader(path).read_metadata().state_dict_metadata for path in (ours, theirs))
    # megatron-core 0.19 has what we put into common.pt, which it reads as well, as an object of its own.
    assert one == {name: value for name, value in other.items() if not name.startswith("common_state/")}
    found, expected = (tensors_and_objects(path) for path in (ours, theirs))
    assert found.keys() == one.keys()
    expected = {name: expected[name] for name in one}
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def tensors_and_objects(path: Path) -> dict[str, Any]:
    """Everything that a checkpoint stores, by torch's own reader."""
    state: dict[str, Any] = {}
    for key, stored in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            state[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        else:
            state[key] = io.BytesIO()
    checkpoint.load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return {key: value if isinstance(value, torch.Tensor) else saved_bytes(value) for key, value in state.items()}


def saved_bytes(value: object) -> list[int]:
    data = io.BytesIO()
    torch.save(value, data)
    return list(data.getvalue())


def test_a_writer_that_fails_is_an_exception_with_its_cause(
    policy: tuple[Model, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.filesystem, "_write_item", full)
    with pytest.raises(RuntimeError) as caught:
        save_checkpoint(tmp_path, *policy, DONE, keep=1)
    assert no_room(caught.value) is not None
    assert list(tmp_path.iterdir()) == []
