"""The experts of one layer, and the dispatch around them, against megatron-core's own, by turns in one process.

    python tools/benchmark_experts.py [--repeats 15] [--shapes tokens,hidden,width,experts,topk[,dtype] ...]

Rows of the table: `experts` is GroupedExperts against SequentialMLP on the same rows, `dispatch` laying tokens out by
expert and adding them up again against megatron-core's permute and unpermute. Figures are the medians over repeats of
megatron-core's seconds and of ours, and the median of their ratios, pair by pair; forward alone and with backward.
Results are compared first. Seconds are the process's CPU time on a CPU and wall time on a GPU, where it runs if there
is one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gspo_moe.config import Config
from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout

SHAPES = ("4608,256,128,16,4", "2048,512,192,128,8", "64,256,128,16,4", "64,512,192,128,8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[bool], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    width: int
    experts: int
    topk: int
    dtype: str = "fp32"

    @classmethod
    def parse(cls, text: str) -> Shape:
        parts = text.split(",")
        tokens, hidden, width, experts, topk = map(int, parts[:5])
        return cls(tokens, hidden, width, experts, topk, *parts[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the experts of a layer with megatron-core's.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="T,H,F,E,K[,DTYPE]")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599", "RANK": "0", "WORLD_SIZE": "1"})
    from gspo_moe.parallel.groups import initialize, shut_down
    from gspo_moe.platform import device

    where = torch.cuda.get_device_name() if device().kind == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {options.repeats} repeats")
    print("| tokens, hidden, width, experts, top-k | part | pass | megatron-core ms | ours ms | faster |")
    print("|---|---|---|---|---|---|")
    layout = Layout(1, 1, 1, 1, None, 1, 1, 1, sequence_parallel=False)
    initialize(layout, seed=1)
    for text in options.shapes:
        shape = Shape.parse(text)
        for part, theirs, ours in (("experts", *expert_steps(shape, layout)), ("dispatch", *dispatch_steps(shape))):
            for name, backward in (("forward", False), ("forward + backward", True)):
                compare(f"| {text} | {part} | {name} |", theirs, ours, backward, options.repeats)
    shut_down()
    assert not dist.is_initialized()


def compare(label: str, theirs: Step, ours: Step, backward: bool, repeats: int) -> None:
    torch.testing.assert_close(ours(backward), theirs(backward), atol=2e-2, rtol=2e-2)
    pairs = [(seconds(theirs, backward), seconds(ours, backward)) for _ in range(repeats)]
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(their / our for their, our in pairs)
    print(f"{label} {first * 1e3:.2f} | {second * 1e3:.2f} | {ratio:.2f}x |", flush=True)


def seconds(step: Step, backward: bool) -> float:
    from gspo_moe.platform import device

    clock = time.perf_counter if device().kind == "cuda" else time.process_time
    device().synchronize()
    start = clock()
    step(backward)
    device().synchronize()
    return clock() - start


def routes(shape: Shape, place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    scores_TE = torch.rand(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(1)).to(place)
    map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, scores_TE.topk(shape.topk).indices, True)
    return map_TE, scores_TE * map_TE


def expert_steps(shape: Shape, layout: Layout) -> tuple[Step, Step]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from gspo_moe.model.experts import GroupedExperts
    from gspo_moe.model.spec import transformer_config
    from gspo_moe.platform import choose_backends, device

    sizes = Architecture(
        vocab_size=8,
        hidden_size=shape.hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.topk,
    )
    config = Config.model_validate({"model": {"preset": "tiny", "dtype": shape.dtype, "backend": "local"}})
    megatron = transformer_config(sizes, layout, config, choose_backends(dict(config.model.backend), shape.dtype))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    grouped = GroupedExperts(shape.experts, megatron, pg_collection=groups)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    one_by_one = SequentialMLP(shape.experts, megatron, linears, pg_collection=groups)
    with torch.no_grad():
        for name in ("linear_fc1", "linear_fc2"):
            stacked = getattr(grouped, name).weight
            stacked.normal_(0, 0.05)
            for expert, weight in zip(one_by_one.local_experts, stacked, strict=True):
                getattr(expert, name).weight.copy_(weight)
    place = device().torch_device
    map_TE, _ = routes(shape, place)
    rows = torch.randn(shape.tokens * shape.topk, shape.hidden, device=place).to(DTYPES[shape.dtype]).requires_grad_()
    probs = torch.rand(len(rows), device=place)

    def step(module: Any) -> Step:
        def run(backward: bool) -> torch.Tensor:
            with torch.set_grad_enabled(backward):
                output: torch.Tensor = module(rows, map_TE.sum(0), probs)[0]
            if backward:
                module.zero_grad()
                output.backward(rows.detach())
            return output

        return run

    return step(one_by_one), step(grouped)


def dispatch_steps(shape: Shape) -> tuple[Step, Step]:
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    from gspo_moe.model.dispatch import chosen, collect, row_order, spread
    from gspo_moe.platform import device

    place = device().torch_device
    map_TE, probs_TE = routes(shape, place)
    hidden = torch.randn(shape.tokens, shape.hidden, device=place).to(DTYPES[shape.dtype]).requires_grad_()
    probs_TE = probs_TE.requires_grad_()
    count = shape.tokens * shape.topk

    def theirs(backward: bool) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            rows, probs, order = permute(hidden, map_TE, probs=probs_TE, num_out_tokens=count)[:3]
            output: torch.Tensor = unpermute((rows * probs[:, None]).to(rows.dtype), order, hidden.shape)
        if backward:
            output.backward(hidden.detach())
        return output

    def ours(backward: bool) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            order = row_order(map_TE, count)
            rows, probs = spread(hidden, order), chosen(probs_TE, order)
            output = collect((rows * probs[:, None]).to(rows.dtype), order)
        if backward:
            output.backward(hidden.detach())
        return output

    return theirs, ours


if __name__ == "__main__":
    main()
