"""The GPU gives the numbers that were recorded on a CPU, with either backend and over several GPUs."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gspo_moe.errors import ConfigError
from gspo_moe.model.build import build_model
from gspo_moe.model.forward import run
from gspo_moe.model.inputs import ModelInput
from gspo_moe.model.weights import load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.platform import choose_backends, device
from gspo_moe.training.optimizer import Optimizer
from tests.gpu.golden import BF16, FP32, SIZES, Tolerance, check, golden, observe, settings, weights
from tests.launch import launch
from tests.qwen3 import Tensors, layout


def check_golden(world_size: int, parallel: dict[str, int], dtype: str, backend: str, tolerance: Tolerance) -> None:
    found = observe(settings(dtype, backend), layout(world_size, **parallel))
    if os.environ["RANK"] == "0":
        check(found, golden(), tolerance)


def test_fp32_gives_the_recorded_numbers() -> None:
    launch(check_golden, 1, 1, {}, "fp32", "local", FP32)


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_bf16_gives_the_recorded_numbers(backend: str) -> None:
    needs(backend)
    launch(check_golden, 1, 1, {}, "bf16", backend, BF16)


def check_an_empty_pack(dtype: str, backend: str) -> None:
    groups = initialize(layout(), seed=1)
    config = settings(dtype, backend)
    model = build_model(config, SIZES, groups)
    load_weights(model, Tensors(weights()))
    optimizer = Optimizer(config, model, total_updates=1)
    optimizer.zero_grad()
    none = torch.zeros(0, dtype=torch.int64, device=device().torch_device)
    run(
        model, [ModelInput(none, none, none.new_zeros(1))], lambda _, stage: (stage.logits().sum(), None), backward=True
    )
    gradients: list[Any] = [getattr(parameter, "main_grad", None) for parameter in model.gpt_chunks[0].parameters()]
    assert all(not gradient.any() for gradient in gradients)
    shut_down()


@pytest.mark.parametrize(("dtype", "backend"), [("fp32", "local"), ("bf16", "transformer_engine")])
def test_a_rank_with_nothing_to_run_adds_nothing(dtype: str, backend: str) -> None:
    needs(backend)
    launch(check_an_empty_pack, 1, dtype, backend)


def check_that_backends_agree() -> None:
    local, engine = (observe(settings("bf16", backend), layout()) for backend in ("local", "transformer_engine"))
    check(engine, local, BF16)


def test_both_backends_agree() -> None:
    needs("transformer_engine")
    launch(check_that_backends_agree, 1)


@pytest.mark.parametrize(
    "parallel", [{"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 1}, {"pipeline": 2}]
)
@pytest.mark.parametrize(("dtype", "backend"), [("fp32", "local"), ("bf16", "transformer_engine")])
def test_two_gpus_give_the_recorded_numbers(parallel: dict[str, int], dtype: str, backend: str) -> None:
    needs(backend, gpus=2)
    launch(check_golden, 2, 2, parallel, dtype, backend, FP32 if dtype == "fp32" else BF16)


def check_nccl(world_size: int) -> None:
    groups = initialize(layout(world_size), seed=1)
    assert dist.get_backend() == "nccl"
    ranks = torch.full((3,), float(groups.rank), device=device().torch_device)
    dist.all_reduce(ranks, group=groups.data)
    assert ranks.tolist() == [sum(range(world_size))] * 3
    received = torch.empty(world_size, device=device().torch_device)
    dist.all_to_all_single(received, torch.full_like(received, groups.rank))
    assert received.tolist() == list(range(world_size))
    shut_down()


def test_every_gpu_joins_over_nccl() -> None:
    gpus = torch.cuda.device_count()
    launch(check_nccl, gpus, gpus)


def needs(backend: str, gpus: int = 1) -> None:
    """Skips the test, with the reason, where this machine lacks the backend or the GPUs."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, and torch finds {torch.cuda.device_count()}")
    try:
        choose_backends(dict(settings("bf16", backend).model.backend), "bf16")
    except ConfigError as error:
        pytest.skip(str(error))
