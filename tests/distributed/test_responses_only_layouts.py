"""The output layer on response tokens alone, also on ranks that have none of a pack."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_moe.model.inputs import response_positions
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import initialize, shut_down
from tests.launch import launch, renew_port
from tests.policy import packs_of
from tests.qwen3 import layout
from tests.unit.training.test_responses_only import compare, outcome, samples, smooth


def observe(response: int, fused: bool, parallel: dict[str, Any]) -> None:
    if response == 1:
        assert has_rank_without_response(parallel)
    found = outcome(smooth(fused), everything=False, response=response, **parallel)
    compare(found, outcome(smooth(fused), everything=True, response=response, **parallel))


def has_rank_without_response(parallel: dict[str, Any]) -> bool:
    groups = initialize(layout(**parallel), seed=1)
    (pack,) = packs_of(samples(1)[:1], per_pack=1)
    count = torch.tensor(len(response_positions(pack, ContextSplit(pack.cu_seqlens, groups.context))))
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MIN)
    renew_port()
    shut_down()
    return int(count) == 0


@pytest.mark.parametrize(
    ("response", "fused", "parallel"),
    [
        (3, True, {"tensor": 2}),
        (3, False, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
        (1, True, {"context": 2}),
        (1, True, {"tensor": 2, "context": 2}),
    ],
)
def test_other_tokens_take_no_part(response: int, fused: bool, parallel: dict[str, Any]) -> None:
    ranks = parallel.get("tensor", 1) * parallel.get("context", 1)
    launch(observe, ranks, response, fused, parallel)
