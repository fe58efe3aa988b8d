"""Predicted routes, what predictors learn and their checkpoints are the same in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.errors import DivergenceError
from gspo_moe.model.replicas import named_over_ranks
from gspo_moe.parallel.groups import shut_down
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.training import learn, rl
from gspo_moe.training.checkpoint import load_checkpoint, save_checkpoint
from gspo_moe.training.session import Trainer
from tests.launch import launch
from tests.unit.training.test_predictor import cut, opened

COMMON = (
    "model={preset: tiny, overrides: {num_hidden_layers: 4, hidden_size: 32, num_experts: 8, initializer_range: 0.2}}",
    "algorithm.mini_batches=2",
    "optimizer.lr=1e-3",
    "routing.predictor_lr_factor=30",
)
FIGURES = ("kl", "kl_unchanged", "changed")
LAYOUTS = {
    "expert": ("parallel.expert=2",),
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2",),
    "context": ("parallel.context=2",),
    "interleaved": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "recompute": ("parallel.recompute=full", "parallel.distributed_optimizer=true"),
}


def own(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The predictors of this rank, by a name over all ranks."""
    assert trainer.optimizer.predictor is not None
    named = trainer.optimizer.predictor.named(named_over_ranks(trainer.session.model))
    return {name: weight.detach().clone() for name, weight in named.items()}


def steps(trainer: Trainer) -> dict[str, Any]:
    """Figures of three steps, of which the first foretells nothing yet, and what the predictors are then."""
    with pytest.MonkeyPatch.context() as patch:
        # Packs of other lengths in each pass.
        patch.setattr(rl, "learn", lambda of, batch: learn.learn(of, cut(batch, lambda index: 2 + index % 7)))
        metrics = [rl.rl_step(trainer).metrics for _ in range(3)]
    names = [*(f"routing/predictor/{name}" for name in FIGURES), "routing/replay/forced", "kl/old_k3"]
    figures = [[one[name] for name in names] for one in metrics]
    assert all(one["routing/replay/aligned"] == pytest.approx(1, abs=2e-3) for one in metrics)
    return {"figures": figures, "weights": {k: v for part in gather_objects(own(trainer)) for k, v in part.items()}}


def check_layouts(folder: Path, names: tuple[str, ...]) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=False)
    for name in names:
        with opened(folder / name, *COMMON, *LAYOUTS[name]) as trainer:
            trainer.replicas(step=0)
            found = steps(trainer)
            for one, other in zip(found["figures"], expected["figures"], strict=True):
                assert one == pytest.approx(other, rel=2e-2, abs=1e-7), name
            assert found["weights"].keys() == expected["weights"].keys()
            for key, weight in found["weights"].items():
                # Adam's steps are of one size, so that gradients near 0 go either way.
                assert (weight - expected["weights"][key]).abs().quantile(0.9) < 2e-3, (name, key)
            trainer.replicas(step=3)
            path = folder / f"of {name}"
            save_checkpoint(path, trainer.session.model, trainer.optimizer, trainer.progress, keep=1)
            if trainer.session.groups.is_main:
                torch.save(found["weights"], path / "weights.pt")
            if name == "expert":
                check_spoilt(trainer)
        shut_down()


def check_spoilt(trainer: Trainer) -> None:
    assert trainer.optimizer.predictor is not None
    if trainer.session.groups.rank:
        trainer.optimizer.predictor.weights[1][2, 3] = 0.5
    place = r"predictor of decoder\.layers\.1\.mlp\.router\.weight\[2, 3\]"
    with pytest.raises(DivergenceError, match=rf"{place} is \S+ on rank 0 and 0\.5 on rank 1"):
        trainer.replicas(step=4)


def in_one_process(folder: Path) -> dict[str, Any]:
    with opened(folder, *COMMON) as trainer:
        return steps(trainer)


@pytest.mark.parametrize(
    "names",
    [
        ("expert", "tensor", "pipeline"),
        pytest.param(("context", "interleaved", "recompute"), marks=pytest.mark.slow),
    ],
)
def test_every_layout_foretells_and_learns_alike(names: tuple[str, ...], tmp_path: Path) -> None:
    expected = in_one_process(tmp_path / "one")
    first, *_, last = expected["figures"]
    assert first[2] == 0 < last[2]
    torch.save(expected, tmp_path / "expected.pt")
    launch(check_layouts, 2, tmp_path, names)
    with opened(tmp_path / "again", *COMMON) as trainer:
        for name in names:
            (path,) = (tmp_path / f"of {name}").glob("step_*")
            load_checkpoint(path, trainer.session.model, trainer.optimizer)
            weights = torch.load(path.parent / "weights.pt")
            found = own(trainer)
            assert found.keys() == weights.keys()
            assert all(torch.equal(value, weights[key]) for key, value in found.items()), name
            assert trainer.optimizer.predictor is not None
            assert trainer.optimizer.predictor.steps == 3
