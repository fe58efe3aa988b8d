"""Engines of other numerics than the trainer's: what several processes sample is what one process samples.

Not to the last digit: bf16 rounds sums of other batches otherwise now and then, and sums of tensor ranks always. So
what layouts differ by is held against what the numerics themselves do to the trainer's rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.weights import RandomSource
from gspo_moe.parallel.reduce import from_last_stage, gather_over_data
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.numerics import rounded_copy
from gspo_moe.rollout.engine import Request
from gspo_moe.scoring.score import score
from gspo_moe.types import Rollout
from tests.launch import launch
from tests.policy import as_sample, packs_of, sampling
from tests.qwen3 import architecture, built, layout, random_sequences

SIZES = architecture(num_hidden_layers=4, initializer_range=0.2)
PROMPTS = random_sequences(SIZES, [3 + number % 6 for number in range(40)])
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{"expert": 2}, {"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"context": 2}],
    4: [{"tensor": 2, "expert": 2, "expert_tensor": 1}, {"tensor": 2, "pipeline": 2}],
}
# By numerics and whether sums go over tensor ranks: how far layouts may be apart, over how far the trainer is.
SHARE = {
    ("bf16", False): 0.25,
    ("bf16", True): 3.0,
    ("fp8_rounded", False): 0.1,
    ("fp8_rounded", True): 0.5,
}
Named = dict[tuple[str, int], Rollout]


@dataclass(frozen=True)
class Found:
    """Rollouts by uid and sample; k3 (nats) of the log-probs that the copy and the trainer find of them."""

    rollouts: Named
    to_copy: float
    to_trainer: float


def generated(numerics: str, of: Layout, parallel: dict[str, Any]) -> Found:
    """Of all data-parallel ranks."""
    config = Config.model_validate({"model": "tiny", "rollout": {"numerics": numerics}, "parallel": parallel})
    requests = [Request(f"train/{n}", tuple(ids.tolist()), samples=2) for n, ids in enumerate(PROMPTS)]
    with built(SIZES, of, RandomSource(SIZES, seed=2), config) as model:
        copy = rounded_copy(config, model)
        engine = MegatronEngine(model, max_batch=20, prefill_tokens=24, rounded=copy)
        params = replace(sampling(), report_routes=True)
        mine = [one for group in engine.generate(requests[model.groups.data_rank :: of.data], params) for one in group]
        parts = gather_over_data({(one.uid, one.sample_index): one for one in mine}, model.groups)
        k3 = [mean_k3(each, mine) for each in (model if copy is None else copy.model, model)]
    return Found({name: one for part in parts for name, one in part.items()}, *k3)


def mean_k3(model: Model, mine: Sequence[Rollout]) -> float:
    packs = packs_of([as_sample(one) for one in mine], per_pack=4)
    found = [
        (log_probs_T - pack.rollout_log_probs_T)[pack.response_mask_T.bool()]
        for pack, log_probs_T in zip(packs, score(model, packs), strict=False)
    ]
    parts = from_last_stage(gather_over_data(found, model.groups), model.groups)
    return k3(torch.cat([each for part in parts for each in part]))


def k3(difference: torch.Tensor) -> float:
    return float((difference.double().exp() - 1 - difference.double()).mean())


def compared(found: Named, expected: Named) -> tuple[float, float]:
    """k3, and share of choices that differ, of tokens up to each sample's first other one."""
    assert found.keys() == expected.keys()
    differences: list[float] = []
    flips: list[torch.Tensor] = []
    for name, one in found.items():
        other = expected[name]
        common = _common(one.response_ids, other.response_ids)
        differences += [a - b for a, b in zip(one.log_probs[:common], other.log_probs[:common], strict=True)]
        assert one.routes is not None
        assert other.routes is not None
        fed = len(one.prompt_ids) + max(common - 1, 0)
        ours, theirs = (rollout.sort(dim=-1).values[:fed] for rollout in (one.routes, other.routes))
        flips.append((ours != theirs).any(-1).flatten())
    return k3(torch.tensor(differences)), float(torch.cat(flips).double().mean())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_layouts(world_size: int, numerics: str, folder: Path) -> None:
    trainers, expected = (torch.load(folder / f"{each}.pt", weights_only=False) for each in ("trainer", numerics))
    own = compared(expected.rollouts, trainers.rollouts)
    for parallel in LAYOUTS[world_size]:
        found = generated(numerics, layout(world_size, **parallel), parallel)
        share = SHARE[numerics, parallel.get("tensor", 1) > 1]
        figures = (found.to_copy, *compared(found.rollouts, expected.rollouts))
        bounds = (share * found.to_trainer, *(share * figure for figure in own))
        assert all(figure <= bound for figure, bound in zip(figures, bounds, strict=True)), (parallel, figures, bounds)


@pytest.mark.parametrize(
    ("world_size", "numerics"),
    [
        (2, "fp8_rounded"),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(4, "fp8_rounded", marks=pytest.mark.slow),
    ],
)
def test_every_layout_samples_what_one_process_samples(world_size: int, numerics: str, tmp_path: Path) -> None:
    for each in ("trainer", numerics):
        torch.save(generated(each, layout(), {}), tmp_path / f"{each}.pt")
    launch(check_layouts, world_size, world_size, numerics, tmp_path)
