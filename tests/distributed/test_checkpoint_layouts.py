"""Training state handed on from layout to layout, unchanged to the bit, and the run that goes on from it in each."""

import logging
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.errors import SaveError
from gspo_moe.model.build import Model
from gspo_moe.model.reading import dist_checkpointing
from gspo_moe.model.sharded import load_stored_weights
from gspo_moe.model.weights import RandomSource
from gspo_moe.training.checkpoint import Destination, Progress, begin_save, load_checkpoint, save_checkpoint
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.packs import microbatches, pack_share
from gspo_moe.types import TrainingSample
from tests.launch import launch
from tests.policy import trained
from tests.qwen3 import architecture, layout, random_sequences
from tests.replicas import check_replicas
from tests.steps import train_supervised

DONE = Progress(step=2, prompt_position=12, policy_version=3)


@dataclass(frozen=True)
class Ring:
    """Layouts of two processes through which a state goes that one process made and, at the end, takes back.

    `+` marks a distributed optimizer. exact: updates whose metrics equal those of the uninterrupted run.
    tolerance: relative. In bf16 every layout rounds otherwise, and differences grow with each update.
    """

    stages: tuple[str, ...]
    dtype: str = "fp32"
    tied: bool = False
    exact: int = 2
    tolerance: float = 1e-5


# Odd vocabularies are padded under tensor parallelism. Tied embeddings over stages have buckets of their own.
RINGS = {
    "fp32": Ring(("expert", "data", "tensor", "expert+", "pipeline+", "data+", "tensor+", "context+", "interleaved")),
    "tied": Ring(("pipeline+", "tensor"), tied=True),
    "bf16": Ring(("expert+", "tensor+", "pipeline", "data+"), dtype="bf16", exact=1, tolerance=2e-2),
}
LAYOUTS: dict[str, dict[str, int]] = {
    "data": {},
    "expert": {"expert": 2},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}


def configured(ring: Ring, stage: str = "data") -> Config:
    optimizer = {"lr": 1e-2, "eps": 1e-3, "decay": "linear", "warmup_updates": 3, "weight_decay": 0.1, "clip_grad": 0.5}
    parallel = {**LAYOUTS[stage.removesuffix("+")], "distributed_optimizer": stage.endswith("+")}
    model = {"preset": "tiny", "dtype": ring.dtype}
    return Config.model_validate({"model": model, "optimizer": optimizer, "parallel": parallel})


def sizes(ring: Ring) -> Architecture:
    return architecture(num_hidden_layers=4, initializer_range=0.25, tie_word_embeddings=ring.tied)


def learn(model: Model, optimizer: Optimizer, config: Config, updates: int) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of updates on the same batch."""
    samples = [
        TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1))
        for ids in random_sequences(model.architecture, (5, 9, 7, 6), seed=10)
    ]
    packs = microbatches(pack_share(samples, model.groups, config))
    found = []
    for _ in range(updates):
        statistics, update = train_supervised(model, optimizer, packs, num_tokens=23)
        found.append((statistics.to_metrics()["sft/loss"], update.grad_norm, update.learning_rate))
    return found


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, read without the project's code. Collective."""
    found = dist_checkpointing.load_plain_tensors(str(path))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], vocabulary: int) -> list[str]:
    """Names of what is not the same, bit for bit, but for the vocabulary's padding."""
    wrong = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        rows = vocabulary if name.endswith(("word_embeddings.weight", "output_layer.weight")) else len(ours[name])
        if not torch.equal(ours[name][:rows], theirs[name][:rows]):
            wrong.append(name)
    return wrong


def hand_on(folder: Path) -> None:
    """Takes each ring's state through its layouts and goes on from it in each, on two processes."""
    fail_to_save(folder / "failed")
    for kind, ring in RINGS.items():
        expected = torch.load(folder / kind / "expected.pt")
        path = folder / kind / "start" / "step_00000002"
        state: dict[str, torch.Tensor] = {}
        other = RandomSource(sizes(ring), seed=77)
        for number, stage in enumerate(ring.stages):
            config = configured(ring, stage)
            place = layout(2, **LAYOUTS[stage.removesuffix("+")])
            with trained(config, place, sizes(ring), other) as (model, optimizer):
                state = state or stored(path)
                assert load_checkpoint(path, model, optimizer) == DONE
                loaded = [parameter.detach().clone() for chunk in model.chunks for parameter in chunk.parameters()]
                load_stored_weights(model, path)
                assert all(map(torch.equal, loaded, (p for chunk in model.chunks for p in chunk.parameters())))
                path = save_checkpoint(folder / kind / str(number), model, optimizer, DONE, keep=1)
                handed_on = stored(path)
                assert differing(handed_on, state, sizes(ring).vocab_size) == [], (kind, stage)
                state = handed_on
                found = learn(model, optimizer, config, ring.exact)
                for ours, theirs in zip(found, expected, strict=False):
                    assert ours == pytest.approx(theirs, rel=ring.tolerance), (kind, stage)
                check_replicas(model, stage.removesuffix("+"), ring.tied)


def fail_to_save(folder: Path) -> None:
    """The second process's writer breaks off: both know at once, nothing is left of the save, and the next one works.

    In the background and not; a limit of the kernel's for one process stands for whatever ends a writer.
    """
    place = Destination(folder, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with trained(Config(), layout(2)) as (model, optimizer):
        first = begin_save(place, model, optimizer, DONE).finish()
        later = replace(DONE, step=3)
        for background in (False, True):
            if dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            with pytest.raises(SaveError, match=r"step_00000003 could not be written .*File too large"):
                begin_save(place, model, optimizer, later, background=background).finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            dist.barrier()
            assert list(folder.iterdir()) == [first]
            assert load_checkpoint(first, model, optimizer) == DONE
        written = begin_save(place, model, optimizer, later, background=True).finish()
        dist.barrier()
        assert list(folder.iterdir()) == [written]
        assert load_checkpoint(written, model, optimizer) == later


def test_a_run_goes_on_in_any_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {}
    for kind, ring in RINGS.items():
        config = configured(ring)
        with trained(config, layout(), sizes(ring)) as (model, optimizer):
            learn(model, optimizer, config, updates=2)
            # An update that is left out counts for the schedule and not for Adam.
            model.gpt_chunks[0].decoder.final_layernorm.weight.main_grad[0] = float("nan")
            assert optimizer.update().skipped
            save_checkpoint(tmp_path / kind / "start", model, optimizer, DONE, keep=1)
            expected[kind] = learn(model, optimizer, config, updates=2)
        torch.save(expected[kind], tmp_path / kind / "expected.pt")
    launch(hand_on, 2, tmp_path)
    for kind, ring in RINGS.items():
        config = configured(ring)
        last = tmp_path / kind / str(len(ring.stages) - 1) / "step_00000002"
        with trained(config, layout(), sizes(ring)) as (model, optimizer), caplog.at_level(logging.WARNING):
            assert load_checkpoint(last, model, optimizer) == DONE
            # The layouts in between have left no trace: this is the uninterrupted run, bit for bit.
            assert learn(model, optimizer, config, updates=2) == expected[kind]
        assert f"{last} was written in another layout: random number generators start" in caplog.text
