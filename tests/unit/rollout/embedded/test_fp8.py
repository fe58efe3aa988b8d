"""Rounding to FP8 against the format's definition in float64: the nearest of its values, times the block's scale."""

import math

import numpy as np
import pytest
import torch

from gspo_moe.rollout.embedded.fp8 import round_activations, round_weight

# float8_e4m3fn (arXiv 2209.05433): sign, 4 bits of exponent with bias 7, 3 of mantissa; 448 is the largest.
STEPS = np.arange(8) / 8
NORMAL = np.array([2.0 ** (exponent - 7) * (1 + step) for exponent in range(1, 16) for step in STEPS])[:-1]
VALUES = np.concatenate([2.0**-6 * STEPS, NORMAL])
EVEN = np.arange(len(VALUES)) % 2 == 0  # the last bit of the mantissa is 0


def nearest(values: np.ndarray) -> np.ndarray:
    """Of the format's values, the even one of two equally near."""
    size = np.abs(values)
    above = np.searchsorted(VALUES, size).clip(0, len(VALUES) - 1)
    below = (above - 1).clip(0)
    up, down = VALUES[above] - size, size - VALUES[below]
    higher = (up < down) | ((up == down) & EVEN[above])
    return np.copysign(VALUES[np.where(higher, above, below)], values)


def expected(block: np.ndarray) -> np.ndarray:
    """A block with one scale, the smallest power of two that leaves nothing beyond 448."""
    largest = np.abs(block).max()
    scale = 1.0 if largest == 0 else 2.0 ** math.ceil(math.log2(largest / 448))
    return nearest(block / scale) * scale


def expected_of_blocks(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    found = np.empty_like(values)
    for top in range(0, values.shape[0], rows):
        for left in range(0, values.shape[1], columns):
            part = slice(top, top + rows), slice(left, left + columns)
            found[part] = expected(values[part])
    return found


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values of many sizes, some of them 2^20 times smaller than others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-20, 1, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**sizes


def test_the_format_has_the_values_of_torch() -> None:
    bits = torch.arange(127, dtype=torch.uint8)  # without sign; 127 is NaN
    assert bits.view(torch.float8_e4m3fn).double().tolist() == VALUES.tolist()


@pytest.mark.parametrize("shape", [(256, 128), (300, 200), (5, 130), (130, 5), (1, 1)])
def test_weights_have_a_scale_a_block(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    found = round_weight(weight)
    assert np.array_equal(found.double().numpy(), expected_of_blocks(weight.double().numpy(), 128, 128))
    assert torch.equal(found.bfloat16().float(), found)
    stacked = round_weight(torch.stack([weight, 3 * weight]))
    assert torch.equal(stacked[0], found)
    assert torch.equal(stacked[1], round_weight(3 * weight))


@pytest.mark.parametrize("width", [384, 200, 128, 24])
def test_activations_have_a_scale_a_token_and_group(width: int) -> None:
    values = drawn(7, width).bfloat16()
    found = round_activations(values)
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.double().numpy(), expected_of_blocks(values.double().numpy(), 1, 128))
    three = round_activations(values[:, None])
    assert torch.equal(three[:, 0], found)


@pytest.mark.parametrize("largest", [448.0, 448.00003, 2.0**-9, 1.75, 1.7500001, 3e38, 1e-30, 0.0])
def test_scales_change_where_they_should(largest: float) -> None:
    values = torch.tensor([[largest, largest / 3, -largest / 100]])
    assert np.array_equal(round_activations(values).double().numpy(), expected(values.double().numpy()))


def test_what_is_not_finite_stays_so() -> None:
    found = round_activations(torch.tensor([[1.0, torch.inf], [1.0, torch.nan], [1.0, 2.0]]))
    assert found.isfinite().all(1).tolist() == [False, False, True]


def test_a_shards_blocks_change_its_smallest_values_alone() -> None:
    weight = drawn(128, 128)
    weight[64:] /= 1000
    whole, shards = round_weight(weight), torch.cat([round_weight(part) for part in weight.split(64)])
    differ = whole != shards
    assert differ.any()
    assert weight[differ].abs().max() < weight.abs().max() * 2.0**-13
    assert ((whole - shards).abs().max() / weight.abs().max()) < 2.0**-18
