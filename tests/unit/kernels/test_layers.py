"""RMSNorm and rotary embedding against float64 autograd of their formulas."""

from __future__ import annotations

import pytest
import torch

from gspo_moe.kernels import has_layer_kernels, kernels, rms_norm, rotary

pytestmark = pytest.mark.skipif(kernels().cpu is None, reason="no kernel is built")
EPS = 1e-6
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # an error beside a value of 1 or more


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def exact_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def assert_near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, summed: int = 1) -> None:
    assert found.dtype == dtype
    scale = BOUNDS[dtype] * (exact.abs().clamp(min=1.0) * summed**0.5)
    assert ((found.double() - exact).abs() <= scale).all()


@pytest.mark.parametrize("dtype", BOUNDS)
# Widths beside those of whole vectors, more rows than one block of the weight's gradient has, and none.
@pytest.mark.parametrize("shape", [(5, 1, 64), (3, 1, 2, 19), (700, 3, 16), (4, 8), (0, 2, 8), (0, 8)])
def test_norm_and_its_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = drawn(*shape, dtype=dtype, seed=1).requires_grad_()
    weight = drawn(shape[-1], dtype=dtype, seed=2).requires_grad_()
    upstream = drawn(*shape, dtype=dtype, seed=3)
    out = rms_norm(x, weight, EPS)
    found = torch.autograd.grad(out, (x, weight), upstream)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    exact = exact_norm(exact_x, exact_weight)
    expected = torch.autograd.grad(exact, (exact_x, exact_weight), upstream.double())
    assert_near(out, exact, dtype)
    assert_near(found[0], expected[0], dtype, summed=4)
    assert_near(found[1], expected[1], dtype, summed=max(x.numel() // shape[-1], 1))
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), out)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(7, 3, 32), (40, 2, 10), (0, 2, 8)])
def test_rotary_and_its_gradient(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = drawn(*shape, dtype=dtype, seed=1).requires_grad_()
    cos, sin = (drawn(shape[0], shape[2], dtype=dtype, seed=seed) for seed in (2, 3))
    upstream = drawn(*shape, dtype=dtype, seed=4)
    out = rotary(x, cos, sin)
    (found,) = torch.autograd.grad(out, x, upstream)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_rotary(exact_x, cos.double(), sin.double())
    (expected,) = torch.autograd.grad(exact, exact_x, upstream.double())
    assert_near(out, exact, dtype)
    assert_near(found, expected, dtype)
    with torch.no_grad():
        assert torch.equal(rotary(x, cos, sin), out)


def test_rows_are_read_where_they_lie() -> None:
    mixed = drawn(9, 1, 5, 48, dtype=torch.float32, seed=1)
    weight, cos, sin = (drawn(*shape, dtype=torch.float32, seed=2) for shape in ((16,), (9, 16), (9, 16)))
    part = mixed[..., 16:32]
    assert not part.is_contiguous()
    assert torch.equal(rms_norm(part, weight, EPS), rms_norm(part.contiguous(), weight, EPS))
    assert torch.equal(rotary(part[:, 0], cos, sin), rotary(part[:, 0].contiguous(), cos, sin))
    upstream = part.clone().transpose(0, 2).contiguous().transpose(0, 2)
    results = []
    for grad in (upstream, upstream.contiguous(), torch.ones(1).expand_as(part)):
        x = part.clone().requires_grad_()
        (found,) = torch.autograd.grad(rms_norm(x, weight, EPS), x, grad)
        results.append(found)
    assert torch.equal(results[0], results[1])
    x = part.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x)
    assert torch.equal(results[2], expected)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(dtype: torch.dtype) -> None:
    x, weight = drawn(3000, 2, 64, dtype=dtype, seed=1), drawn(64, dtype=dtype, seed=2)
    cos, sin = (drawn(3000, 64, dtype=dtype, seed=seed) for seed in (3, 4))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            rows, leaf = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = rms_norm(rows, leaf, EPS)
            results.append([out, rotary(x, cos, sin), *torch.autograd.grad(out, (rows, leaf), x)])
    finally:
        torch.set_num_threads(threads)
    for one, four in zip(*results, strict=True):
        assert torch.equal(one, four)
    assert torch.equal(rms_norm(x[5:6], weight, EPS), results[0][0][5:6])
    assert torch.equal(rotary(x[5:6], cos[5:6], sin[5:6]), results[0][1][5:6])


def test_other_dtypes_are_not_taken() -> None:
    x = torch.ones(2, 2, 4)
    assert has_layer_kernels(x, x)
    assert not has_layer_kernels(x, x.bfloat16())
    assert not has_layer_kernels(x.double())
    assert not has_layer_kernels(x.to("meta"))
