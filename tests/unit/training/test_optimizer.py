"""The optimizer in one process, against torch's AdamW and the schedules' formulas."""

import math
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.training.optimizer import Optimizer
from tests.policy import trained
from tests.qwen3 import layout

UPDATES = 10  # what `trained` plans for


def configured(dtype: str = "fp32", distributed: bool = False, **optimizer: Any) -> Config:
    parallel = {"distributed_optimizer": distributed}
    model = {"preset": "tiny", "dtype": dtype}
    return Config.model_validate({"optimizer": optimizer, "parallel": parallel, "model": model})


def give_gradients(model: Model, optimizer: Optimizer, seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Random gradients in place of a backward pass; those with a seed are the same in every model."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, parameter in model.gpt_chunks[0].named_parameters():
        gradients[name] = size * torch.randn(parameter.shape, generator=generator)
        parameter.main_grad.copy_(gradients[name])
    return gradients


def learning_rates(**optimizer: Any) -> list[float]:
    with trained(configured(**optimizer), layout()) as (_, trainer):
        trainer.zero_grad()
        return [trainer.update().learning_rate for _ in range(UPDATES + 2)]


def test_a_constant_rate_stays() -> None:
    assert learning_rates(lr=3e-4) == [3e-4] * (UPDATES + 2)


def test_warm_up_rises_in_equal_steps_from_the_first_update() -> None:
    assert learning_rates(lr=4e-4, warmup_updates=4)[:6] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])


def test_linear_decay_falls_in_equal_steps_to_the_smallest_rate() -> None:
    expected = [1e-3 - 8e-4 * min(update, UPDATES) / UPDATES for update in range(UPDATES + 2)]
    assert learning_rates(lr=1e-3, min_lr=2e-4, decay="linear") == pytest.approx(expected)


def test_cosine_decay_starts_behind_the_warm_up() -> None:
    # Update 0 is the first step of the warm-up: update u stands at step u + 1.
    warm_up = [5e-4, 1e-3]
    shares = [min(update + 1 - 2, UPDATES - 2) / (UPDATES - 2) for update in range(2, UPDATES + 2)]
    decay = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * share)) for share in shares]
    assert learning_rates(lr=1e-3, min_lr=1e-4, decay="cosine", warmup_updates=2) == pytest.approx(warm_up + decay)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_updates_are_those_of_torchs_adamw_on_clipped_gradients(clip_grad: float, distributed: bool) -> None:
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "clip_grad": clip_grad,
    }
    with trained(configured("fp32", distributed, **settings), layout()) as (model, optimizer):
        parameters = dict(model.gpt_chunks[0].named_parameters())
        mirror = {name: value.detach().double().clone().requires_grad_() for name, value in parameters.items()}
        # megatron-core leaves norms, which have one dimension, without weight decay.
        groups = [
            {"params": [value for value in mirror.values() if value.ndim > 1], "weight_decay": 0.1},
            {"params": [value for value in mirror.values() if value.ndim == 1], "weight_decay": 0.0},
        ]
        reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
        for seed in range(3):
            gradients = give_gradients(model, optimizer, seed)
            norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
            for name, gradient in gradients.items():
                mirror[name].grad = gradient.double() * (min(1.0, clip_grad / norm) if clip_grad else 1.0)
            reference.step()
            assert optimizer.update().grad_norm == pytest.approx(norm, rel=1e-5)
        for name, expected in mirror.items():
            torch.testing.assert_close(parameters[name].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_weights_are_rounded_from_fp32_ones_that_keep_small_updates(distributed: bool) -> None:
    with trained(configured("bf16", distributed, lr=1e-5), layout()) as (model, optimizer):
        parameter = model.gpt_chunks[0].output_layer.weight
        assert parameter.dtype == torch.bfloat16
        before = parameter.detach().clone()
        for _ in range(8):
            give_gradients(model, optimizer, seed=1)
            optimizer.update()
        # Eight steps of 1e-5 in the gradient's direction, the first of which bf16 alone would mostly have lost.
        sign = give_gradients(model, optimizer, seed=1)["output_layer.weight"].sign()
        expected = (before.float() - 8e-5 * sign).bfloat16()
        assert (parameter == expected).float().mean() > 0.99
        assert (parameter != before).float().mean() > 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_with_a_gradient_that_is_not_finite_is_left_out(bad: float, dtype: str) -> None:
    with trained(configured(dtype=dtype, lr=1e-2, warmup_updates=5), layout()) as (model, optimizer):
        before = [parameter.detach().clone() for parameter in model.gpt_chunks[0].parameters()]
        give_gradients(model, optimizer, seed=0)
        model.gpt_chunks[0].output_layer.weight.main_grad[3, 3] = bad
        result = optimizer.update()
        assert result.skipped
        assert not math.isfinite(result.grad_norm)
        assert all(torch.equal(a, b) for a, b in zip(before, model.gpt_chunks[0].parameters(), strict=True))
        give_gradients(model, optimizer, seed=0)
        result = optimizer.update()
        assert not result.skipped
        assert result.learning_rate == pytest.approx(4e-3)
        assert not any(torch.equal(a, b) for a, b in zip(before, model.gpt_chunks[0].parameters(), strict=True))


def test_gradients_are_cleared_between_updates() -> None:
    with trained(configured(), layout()) as (model, optimizer):
        give_gradients(model, optimizer, seed=0)
        optimizer.zero_grad()
        assert optimizer.update().grad_norm == 0
