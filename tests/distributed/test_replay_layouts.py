"""A mini-batch that two processes skipped, in any layout, is what one process computes again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gspo_moe.parallel.groups import shut_down
from gspo_moe.replay.replay import replay
from gspo_moe.training import rl
from gspo_moe.training.batch import Batch
from gspo_moe.training.session import Trainer
from gspo_moe.training.sft import sft_step
from tests.launch import launch, renew_port
from tests.unit.training.test_rl import opened

LAYOUTS = {
    "expert": ("parallel.expert=2", "algorithm.name=rspo"),
    "pipeline": ("parallel.pipeline=2", "routing.replay=r2"),
    "tensor": ("parallel.tensor=2", "algorithm.kl.coeff=0.1"),
    "context": ("parallel.context=2", "algorithm.name=gspo"),
}
learn = rl.learn


def loud(trainer: Trainer, batch: Batch) -> object:
    """One answer of the second mini-batch has an advantage near float32's largest number."""
    samples = [dataclasses.replace(one, advantage=0.1 * (-1) ** i) for i, one in enumerate(batch.samples)]
    samples[9] = dataclasses.replace(samples[9], advantage=3e38)
    return learn(trainer, dataclasses.replace(batch, samples=tuple(samples)))


def dumps(run: Path) -> list[Path]:
    return sorted((run / "skipped").glob("step_*.safetensors"))


def skip_in_each(folder: Path, names: tuple[str, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "learn", loud)
        for name in names:
            with opened(folder / name, *LAYOUTS[name], "algorithm.mini_batches=2") as trainer:
                assert rl.rl_step(trainer).metrics["optimizer/skipped_updates"] == 1
            found = replay(dumps(folder / name)[0])
            assert all(figure.run == figure.here for figure in found.figures), (name, found.figures)
            renew_port()
            shut_down()


@pytest.mark.parametrize("names", [("expert", "pipeline"), pytest.param(("tensor", "context"), marks=pytest.mark.slow)])
def test_one_process_finds_what_two_found(names: tuple[str, ...], tmp_path: Path) -> None:
    launch(skip_in_each, 2, tmp_path, names)
    for name in names:
        files = dumps(tmp_path / name)
        assert len(files) == (2 if name == "expert" else 1), name
        try:
            found = replay(files[-1])
        finally:
            shut_down()
        assert found.is_reproduced, (name, found.figures)
        assert max(found.sequences, key=lambda one: abs(one.loss)).sample == 9, name
        assert (len(found.sequences), found.broken_weights) == (8, []), name


def skip_demonstrations(folder: Path) -> None:
    for name in ("expert", "pipeline"):
        run = opened(folder / name, LAYOUTS[name][0], "stage=sft", "schedule.sft_batch=8")
        with run as trainer, pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.optimizer.megatron, "get_grad_norm", lambda: float("inf"))
            assert sft_step(trainer)["optimizer/skipped_updates"] == 1
        found = replay(dumps(folder / name)[0])
        assert found.figures[0].run == found.figures[0].here, name
        renew_port()
        shut_down()


@pytest.mark.slow
def test_one_process_finds_the_loss_of_demonstrations_that_two_found(tmp_path: Path) -> None:
    launch(skip_demonstrations, 2, tmp_path)
    for name, count in (("expert", 2), ("pipeline", 1)):
        files = dumps(tmp_path / name)
        assert len(files) == count
        try:
            found = replay(files[-1])
        finally:
            shut_down()
        loss, norm = found.figures
        assert loss.is_alike(1e-5)
        assert not norm.is_alike(1e-5), "which data and weights did not make"
        assert [one.sample for one in found.sequences] == list(range(8))
        assert sum(one.loss for one in found.sequences) == pytest.approx(loss.run, rel=1e-5)
