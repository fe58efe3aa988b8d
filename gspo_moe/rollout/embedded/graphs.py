"""CUDA graphs of decode steps: one launch for all kernels of a step, which cost the host more time than the device.

A graph replays kernels on the addresses that it was captured with. So what a step reads and writes must stay where it
is: weights, which every optimizer here updates in place, the cache and the step's inputs. A pool lives as long as its
cache, which is one batch of one `generate`. Captured steps must wait for the device nowhere and have one shape.

Source: torch's notes on CUDA graphs (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

from gspo_moe.model.build import Model
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.platform import device

logger = logging.getLogger(__name__)


class GraphPool:
    """Graphs by shape, in one memory pool: no two of them run at once, and each one's output stays its own."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._stream = torch.cuda.Stream()
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, shape: Hashable, step: Callable[[], Any]) -> Any:
        """What `step` gives, in memory that the next run with this shape fills anew."""
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(step)
        graph, output = self._graphs[shape]
        graph.replay()
        return output

    def _capture(self, step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        # Once without a graph: libraries set themselves up at their first call, which a capture does not allow.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are checked: NCCL's watchdog asks for its events meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            output = step()
        return graph, output


def graph_obstacle(model: Model) -> str | None:
    """Why this model's decode steps cannot be CUDA graphs; None where they can."""
    layout = model.groups.layout
    if device().kind != "cuda":
        return "there is no GPU"
    if layout.pipeline > 1:
        return f"parallel.pipeline is {layout.pipeline}, and stages wait for each other"
    for name in ("tensor", "expert", "expert_tensor"):
        if getattr(layout, name) > 1:
            return f"parallel.{name} is {getattr(layout, name)}, and exchange between its ranks is not captured"
    if not all(_counts_stay_on_device(layer.mlp.experts) for layer in model.gpt_chunks[0].decoder.layers):
        return (
            "the experts take the numbers of their tokens from the host, which is so but for model.dtype=bf16 and "
            "model.backend.experts=local on a GPU of compute capability 9.0 or more"
        )
    return None


def _counts_stay_on_device(experts: Any) -> bool:
    """Whether torch's grouped product has a kernel here for a layer's experts."""
    if not isinstance(experts, GroupedExperts) or experts.linear_fc1.weight.dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def make_graphs(model: Model, wanted: str) -> GraphPool | None:
    """A new pool, None where `rollout.cuda_graph` is off or a GPU's steps cannot be graphs, which is logged once."""
    obstacle = None if wanted == "off" else graph_obstacle(model)
    if obstacle is not None and device().kind == "cuda" and model.groups.rank == 0:
        _warn(obstacle)
    return GraphPool() if wanted == "auto" and obstacle is None else None


@cache
def _warn(obstacle: str) -> None:
    logger.warning("rollout.cuda_graph: tokens are generated without CUDA graphs: %s", obstacle)
