"""PPO with its value head: values, figures, gradient and checkpoints of several processes are those of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.names import VALUE_HEAD
from gspo_moe.model.sharded import load_stored_weights
from gspo_moe.model.weights import RandomSource, draw_value_head
from gspo_moe.parallel.reduce import gather_over_data
from gspo_moe.scoring.score import score_with_values
from gspo_moe.training.checkpoint import load_checkpoint, save_checkpoint
from gspo_moe.training.critic import estimate
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.types import Microbatch, TrainingSample
from tests.distributed.test_policy_layouts import CHECKPOINT, DONE, SIZES, by_sample, packs
from tests.launch import launch
from tests.policy import trained
from tests.qwen3 import layout, random_sequences
from tests.steps import train_minibatch, with_segments

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"expert": 2},
        {"tensor": 2, "distributed_optimizer": True},
        {"pipeline": 2, "recompute": "full"},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2, "distributed_optimizer": True},
    ],
    4: [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "context": 2}],
}
LENGTHS = (9, 14, 5, 11, 21, 2, 8, 12, 7, 16)


def config(**parallel: Any) -> Config:
    """Adam's first step with a large eps is smooth in the gradient."""
    optimizer = {"lr": 1.0, "eps": 1.0}
    algorithm = {"name": "ppo", "options": {"lam": 0.9, "value_clip": 0.05}}
    return Config.model_validate({"algorithm": algorithm, "optimizer": optimizer, "parallel": parallel})


def samples() -> list[TrainingSample]:
    """A prompt, a response, and tool tokens where there is room; with rewards."""
    found = []
    for number, ids in enumerate(random_sequences(SIZES, LENGTHS, seed=8)):
        mask = [0] + [1] * (len(ids) - 1)
        if len(ids) > 8:
            mask[5:7] = [0, 0]
        found.append(TrainingSample(tuple(ids.tolist()), tuple(mask), reward=(-1.0) ** number * (1 + number / 7)))
    return found


def shaken(values: Sequence[torch.Tensor], mine: Sequence[Microbatch], scale: float) -> list[torch.Tensor]:
    """Some way off, by sample and position alone."""
    moved = []
    for pack, values_T in zip(mine, values, strict=False):
        lengths = pack.cu_seqlens.diff().tolist()
        offsets = [
            torch.randn(length, generator=torch.Generator().manual_seed(index))
            for index, length in zip(pack.sample_indices, lengths, strict=True)
        ]
        moved.append(values_T + scale * torch.cat(offsets))
    return moved


def observe(model: Model, optimizer: Optimizer) -> Any:
    """Values, figures of a step, and values behind it; values on the last stage only."""
    mine, settings = packs(model.groups, samples()), config()
    scored = score_with_values(model, mine)
    values = [values_T for _, values_T in scored]
    estimates = estimate(with_segments(mine), shaken(values, mine, 0.1), settings.algorithm.settings, model.groups)
    tokens = sum(sum(sample.response_mask) for sample in samples())
    old = shaken([log_probs_T for log_probs_T, _ in scored], mine, 0.2)
    more: dict[str, Any] = {"num_tokens": tokens, "estimates": estimates}
    result = train_minibatch(model, optimizer, mine, old, settings.algorithm, len(LENGTHS), 1.0, None, **more)
    after = [values_T for _, values_T in score_with_values(model, mine)]
    return {
        "values": by_sample(values, mine),
        "metrics": result.statistics.to_metrics() | {"grad_norm": result.update.grad_norm},
        "after": by_sample(after, mine),
    }


def check_layouts(world_size: int, folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=False)
    for number, parallel in enumerate(LAYOUTS[world_size]):
        place = layout(world_size, **parallel)
        with trained(config(**parallel), place, SIZES) as (model, optimizer):
            has_head = any(name == VALUE_HEAD for chunk in model.gpt_chunks for name, _ in chunk.named_parameters())
            assert has_head == model.groups.is_last_stage
            same_numbers(model, observe(model, optimizer), expected[0], parallel)
            save_checkpoint(folder / str(number), model, optimizer, DONE, keep=1)
            second = observe(model, optimizer)
            same_numbers(model, second, expected[1], parallel)
        with trained(config(**parallel), place, SIZES, RandomSource(SIZES, seed=9)) as (model, optimizer):
            draw_value_head(model, seed=9)
            assert load_checkpoint(folder / str(number) / CHECKPOINT, model, optimizer) == DONE
            assert observe(model, optimizer)["metrics"] == second["metrics"], parallel
            weights_alone(model, folder / str(number) / CHECKPOINT)


def weights_alone(model: Model, checkpoint: Path) -> None:
    """`model.checkpoint` brings the value head along."""
    heads = [p for chunk in model.gpt_chunks for name, p in chunk.named_parameters() if name == VALUE_HEAD]
    draw_value_head(model, seed=3)
    before = [head.detach().clone() for head in heads]
    load_stored_weights(model, checkpoint)
    assert not any(torch.equal(*pair) for pair in zip(before, heads, strict=True))


def same_numbers(model: Model, found: Any, expected: Any, parallel: dict[str, Any]) -> None:
    for name in ("values", "after") if model.groups.is_last_stage else ():
        parts = gather_over_data(found[name], model.groups)
        values = {index: value for part in parts for index, value in part.items()}
        assert values.keys() == expected[name].keys()
        for index, value in values.items():
            error = (value - expected[name][index]).abs().max().item()
            assert error <= 4e-5, (parallel, name, index, error)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=2e-5, abs=2e-6), parallel


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_finds_what_one_process_finds(world_size: int, tmp_path: Path) -> None:
    with trained(config(), layout(), SIZES) as (model, optimizer):
        expected = [observe(model, optimizer) for _ in range(2)]
    metrics = expected[0]["metrics"]
    assert 0 < metrics["value/clip_fraction"] < 1
    assert 0 < metrics["clip_fraction/token"] < 1
    torch.save(expected, tmp_path / "expected.pt")
    launch(check_layouts, world_size, world_size, tmp_path)
