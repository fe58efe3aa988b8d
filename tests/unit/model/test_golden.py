"""The checks that `tests/gpu` runs on a GPU, on the CPU: they pass here, and they see what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu.golden import BF16, FP32, Observed, Tolerance, check, golden, observe, settings, weights
from tests.gpu.rl_step import step_save_and_load, step_twice
from tests.gpu.test_golden import check_an_empty_pack, check_golden
from tests.launch import launch
from tests.qwen3 import layout


@pytest.fixture(scope="module")
def in_fp32() -> Observed:
    return observe(settings("fp32"), layout())


def test_the_cpu_gives_the_recorded_numbers(in_fp32: Observed) -> None:
    check(in_fp32, golden(), FP32)


def test_bf16_gives_them_within_its_tolerance() -> None:
    in_bf16 = observe(settings("bf16"), layout())
    check(in_bf16, golden(), BF16)
    with pytest.raises(AssertionError, match="log-probs"):
        check(in_bf16, golden(), FP32)


def test_two_processes_give_them_too() -> None:
    launch(check_golden, 2, 2, {"pipeline": 2}, "fp32", "local", FP32)


@pytest.mark.parametrize(("tolerance", "part"), [(FP32, 1e-3), (BF16, 1.0)])
def test_a_weight_that_is_off_is_seen(tolerance: Tolerance, part: float) -> None:
    tensors = weights()
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1 + part
    with pytest.raises(AssertionError, match="log-probs"):
        check(observe(settings("fp32"), layout(), tensors), golden(), tolerance)


def test_each_number_is_compared(in_fp32: Observed) -> None:
    one = in_fp32
    wrong = {
        "routes": replace(one, routes=[routes % 7 for routes in one.routes]),
        "loss": replace(one, loss=one.loss + 2e-5),
        "gradient norm": replace(one, grad_norm=one.grad_norm * 1.001),
        "gradient of": replace(one, gradients={name: 1.001 * gradient for name, gradient in one.gradients.items()}),
        "is not": replace(one, greedy=[[*one.greedy[0][:-1], 0], *one.greedy[1:]]),
    }
    for message, observed in wrong.items():
        with pytest.raises(AssertionError, match=message):
            check(observed, golden(), FP32)


def test_a_rank_with_nothing_to_run_adds_nothing() -> None:
    check_an_empty_pack("bf16", "local")


def test_the_gpus_rl_step_passes_on_the_cpu(tmp_path: Path) -> None:
    launch(step_save_and_load, 1, tmp_path, "auto")


def test_the_gpus_repeated_step_passes_on_the_cpu(tmp_path: Path) -> None:
    launch(step_twice, 1, tmp_path, "auto")
