"""When decode steps become CUDA graphs, and that it is said where they cannot; the graphs themselves: tests/gpu."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_moe.model.experts import GroupedExperts
from gspo_moe.rollout.embedded import graphs
from gspo_moe.rollout.embedded.graphs import graph_obstacle, make_graphs
from tests.qwen3 import layout


def experts(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Stacked ones without the process groups that make them."""
    made: Any = GroupedExperts.__new__(GroupedExperts)
    torch.nn.Module.__init__(made)
    made.linear_fc1 = torch.nn.Module()
    made.linear_fc1.weight = torch.nn.Parameter(torch.empty(4, 6, 2, dtype=dtype))
    return made


def model(parallel: dict[str, int], layer: Any, dispatcher: str = "alltoall") -> Any:
    size = torch.Size(parallel.values()).numel()
    decoder = SimpleNamespace(layers=[SimpleNamespace(mlp=SimpleNamespace(experts=layer))] * 2)
    return SimpleNamespace(
        groups=SimpleNamespace(layout=layout(size, **parallel), rank=0),
        config=SimpleNamespace(moe_token_dispatcher_type=dispatcher),
        gpt_chunks=[SimpleNamespace(decoder=decoder)],
    )


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "device", lambda: SimpleNamespace(kind="cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(graphs, "GraphPool", lambda: "a pool")


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("found", "obstacle"),
    [
        (model({}, experts()), None),
        (model({"pipeline": 2}, experts()), "parallel.pipeline is 2"),
        (model({"tensor": 2}, experts()), "parallel.tensor is 2"),
        (model({"expert": 4}, experts()), "parallel.expert is 4"),
        (model({}, experts(), "allgather"), None),
        (model({}, experts(torch.float32)), "model.dtype=bf16"),
        (model({}, SimpleNamespace(local_experts=[])), "numbers of their tokens"),
    ],
)
def test_what_keeps_decode_steps_from_being_graphs(
    found: Any, obstacle: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    graphs._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        pools = [make_graphs(found, "auto") for _ in range(2)]
        assert make_graphs(found, "off") is None
    if obstacle is None:
        assert pools == ["a pool", "a pool"]
        assert not caplog.records
    else:
        assert pools == [None, None]
        (record,) = caplog.records
        assert obstacle in record.getMessage()


def test_a_machine_without_a_gpu_has_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    assert graph_obstacle(model({}, experts())) == "there is no GPU"
    assert make_graphs(model({}, experts()), "auto") is None
    assert not caplog.records
