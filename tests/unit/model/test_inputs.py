"""Packed and padded runs agree, in one process; sequence parallelism's padding is in tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.model.hf import whole_tensors
from gspo_moe.routing import LoadSums
from gspo_moe.routing.comparison import expert_load_of
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.types import Microbatch, TrainingSample
from tests.experts import TokensSeen
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import layout, random_sequences
from tests.steps import train_minibatch

LENGTHS = (9, 14, 2, 11, 21, 6)


def samples() -> list[TrainingSample]:
    sequences = random_sequences(SIZES, LENGTHS, seed=11)
    return [
        TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1), advantage=(-1.0) ** number)
        for number, ids in enumerate(sequences)
    ]


def by_sample(values: list[torch.Tensor], packs: list[Microbatch]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for values_T, pack in zip(values, packs, strict=True):
        assert len(values_T) == pack.num_tokens
        found |= zip(pack.sample_indices, values_T.split(pack.cu_seqlens.diff().tolist()), strict=True)
    return found


def gradient(parameter: Any) -> torch.Tensor:
    reduced: torch.Tensor = parameter.main_grad
    return reduced


def observe(dispatcher: str, per_pack: int) -> dict[str, Any]:
    """One mini-batch, whose old policy lies 1e-3 off."""
    config = Config.model_validate({"parallel": {"dispatcher": dispatcher}, "optimizer": {"clip_grad": 0.0}})
    packs = packs_of(samples(), per_pack)
    with trained(config, layout()) as (model, optimizer):
        scored = zip(score(model, packs), packs, strict=True)
        old = [log_probs_T + 1e-3 * (pack.input_ids_T % 3 - 1) for log_probs_T, pack in scored]
        recorder, seen = RouteRecorder(model.chunks, SIZES, model.groups), TokensSeen(model)
        result = train_minibatch(model, optimizer, packs, old, config.algorithm, len(LENGTHS), 1.0, recorder)
        load = expert_load_of(result.routes, recorder.layers)
        return {
            "log_probs": by_sample(result.log_probs, packs),
            "routes": by_sample([one.routes_TLK.sort(dim=-1).values for one in result.routes], packs),
            "gradients": {name: value.clone() for name, value in whole_tensors(model, gradient)},
            "metrics": result.statistics.to_metrics(),
            "load": LoadSums.from_load(load).to_metrics(),
            "recorded": load,
            "seen": seen.load,
        }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Each sequence in a pack of its own, without padding."""
    return observe("alltoall", per_pack=1)


# The allgather dispatcher makes packs equally long: with two a pack 23 and 12 tokens are padded to 26.
@pytest.mark.parametrize(
    ("dispatcher", "per_pack"), [("alltoall", 6), ("alltoall", 4), ("allgather", 1), ("allgather", 2)]
)
def test_packed_and_padded_runs_agree(alone: dict[str, Any], dispatcher: str, per_pack: int) -> None:
    found = observe(dispatcher, per_pack)
    for number, expected in alone["log_probs"].items():
        torch.testing.assert_close(found["log_probs"][number], expected, atol=1e-5, rtol=0)
        assert torch.equal(found["routes"][number], alone["routes"][number])
    for name, expected in alone["gradients"].items():
        error = (found["gradients"][name] - expected).norm()
        assert error <= 1e-5 * expected.norm(), name
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-6)
    assert found["load"] == alone["load"]


@pytest.mark.parametrize(("dispatcher", "per_pack"), [("alltoall", 4), ("allgather", 1), ("allgather", 2)])
def test_experts_receive_the_real_tokens_and_no_padding(dispatcher: str, per_pack: int) -> None:
    found = observe(dispatcher, per_pack)
    tokens = sum(LENGTHS) - len(LENGTHS)
    assert found["seen"].sum(dim=1).tolist() == [tokens * SIZES.num_experts_per_tok] * SIZES.num_hidden_layers
    assert torch.equal(found["seen"], found["recorded"])
