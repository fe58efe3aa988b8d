"""Route changes against golden vectors and sets, for every integer type that a recorder may keep."""

import json
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.errors import DataError
from gspo_moe.routing import RouteSums, overlap_TL, volatility

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "routing.json").read_text())
METRICS = ("slot_change", "flip_rate", "any_layer_flip", "flipped_layers_per_token", "slot_change_by_layer")


def figures(metrics: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.atleast_1d(metrics[name]) for name in METRICS])


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"experts={case['num_experts']}")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_golden_vectors(case: dict[str, Any], dtype: torch.dtype) -> None:
    metrics = volatility(torch.tensor(case["old"], dtype=dtype), torch.tensor(case["new"], dtype=dtype))
    assert list(metrics) == [*METRICS, "flip_rate_by_layer"]
    np.testing.assert_allclose(np.mean(metrics["flip_rate_by_layer"]), case["flip_rate"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(figures(metrics), figures(case), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"experts={case['num_experts']}")
def test_order_of_slots_has_no_meaning(case: dict[str, Any]) -> None:
    old, new = torch.tensor(case["old"]), torch.tensor(case["new"])
    order = torch.rand(old.shape, generator=torch.Generator().manual_seed(4)).argsort(dim=-1)
    assert volatility(old.gather(-1, order), new) == volatility(old, new.gather(-1, order)) == volatility(old, new)
    assert volatility(old, old.gather(-1, order))["flip_rate"] == 0.0


@pytest.mark.parametrize(
    ("old_dtype", "new_dtype", "num_experts"),
    [(torch.uint8, torch.uint8, 256), (torch.int16, torch.int16, 320), (torch.uint8, torch.int64, 256)],
)
def test_overlap_counts_shared_experts_up_to_the_last_id(
    old_dtype: torch.dtype, new_dtype: torch.dtype, num_experts: int
) -> None:
    # 64 and 320 - 256 collide if ids wrap at 256.
    last = num_experts - 1
    old = torch.tensor([[[last, 0, 7], [last, 64, 1]], [[1, 2, 3], [last - 1, last, 5]]])
    new = torch.tensor([[[0, last, 7], [63, 64, 2]], [[4, 5, 6], [last, 127, last - 1]]])
    expected = [
        [len({*a} & {*b}) for a, b in zip(x, y, strict=True)] for x, y in zip(old.tolist(), new.tolist(), strict=True)
    ]
    assert overlap_TL(old.to(old_dtype), new.to(new_dtype)).tolist() == expected


@pytest.mark.parametrize("sizes", [[64], [1, 63], [0, 20, 0, 44]], ids=str)
def test_merged_sums_equal_the_whole(sizes: list[int]) -> None:
    case = VECTORS[1]
    overlap = overlap_TL(torch.tensor(case["old"]), torch.tensor(case["new"]))
    merged = reduce(RouteSums.merge, [RouteSums.from_overlap(part, topk=8) for part in overlap.split(sizes)])
    np.testing.assert_allclose(figures(merged.to_metrics()), figures(case), rtol=0, atol=1e-10)


def test_no_token_gives_no_figure() -> None:
    nothing = torch.zeros(0, 3, 2, dtype=torch.int64)
    assert volatility(nothing, nothing) == {}


@pytest.mark.parametrize(
    ("old_shape", "new_shape", "dtype", "message"),
    [
        ((5, 2, 2), (5, 3, 2), torch.int64, r"\[5, 2, 2\] and new \[5, 3, 2\]"),
        ((5, 2, 1), (5, 2, 2), torch.int64, r"\[5, 2, 1\] and new \[5, 2, 2\]"),
        ((5, 2), (5, 2), torch.int64, r"\[tokens, layers, topk\]"),
        ((5, 0, 2), (5, 0, 2), torch.int64, r"\[5, 0, 2\]"),
        ((5, 2, 2), (5, 2, 2), torch.float32, "integer"),
    ],
)
def test_bad_routes_are_refused(old_shape: Any, new_shape: Any, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(DataError, match=message):
        volatility(torch.zeros(old_shape, dtype=dtype), torch.zeros(new_shape, dtype=dtype))


def test_figures_need_no_megatron() -> None:
    code = "import sys, gspo_moe.routing; sys.exit(any(name.split('.')[0] == 'megatron' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
