"""Expert load by hand and against NumPy."""

import math
from functools import reduce

import numpy as np
import pytest
import torch

from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.routing import LoadSums, expert_load

# Five tokens, two layers, two of four experts each. Layer 0 loads its experts with 5, 3, 2 and 0; layer 1 with 3, 3, 2
# and 2.
ROUTES = [
    [[0, 1], [0, 1]],
    [[2, 0], [2, 3]],
    [[0, 1], [1, 0]],
    [[1, 0], [3, 1]],
    [[0, 2], [0, 2]],
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_figures_by_hand(dtype: torch.dtype) -> None:
    load = expert_load(torch.tensor(ROUTES, dtype=dtype), num_experts=4)
    assert load.tolist() == [[5, 3, 2, 0], [3, 3, 2, 2]]
    entropy = [
        0.5 * math.log(2) + 0.3 * math.log(10 / 3) + 0.2 * math.log(5),
        0.6 * math.log(10 / 3) + 0.4 * math.log(5),
    ]
    by_layer = {
        "max_violation": [5 / 2.5 - 1, 3 / 2.5 - 1],
        "cv": [math.sqrt((2.5**2 + 0.5**2 + 0.5**2 + 2.5**2) / 4) / 2.5, 0.5 / 2.5],
        "entropy": entropy,
    }
    expected = {f"routing/load/{name}": sum(values) / 2 for name, values in by_layer.items()}
    for name, values in by_layer.items():
        expected |= {f"routing/load/{name}/layer_{layer:02d}": value for layer, value in enumerate(values)}
    assert LoadSums.from_load(load).to_metrics() == pytest.approx(expected, rel=1e-14)


def test_figures_match_numpy_on_uneven_routes() -> None:
    scores = torch.randn(200, 3, 300, generator=torch.Generator().manual_seed(1)) + torch.linspace(0, 2, 300)
    routes = scores.topk(8).indices.to(torch.int16)
    metrics = LoadSums.from_load(expert_load(routes, num_experts=300)).to_metrics()
    for layer in range(3):
        load = np.bincount(routes[:, layer].numpy().ravel(), minlength=300)
        share = load[load > 0] / load.sum()
        expected = {
            "max_violation": load.max() / load.mean() - 1,
            "cv": load.std() / load.mean(),
            "entropy": -(share * np.log(share)).sum(),
        }
        found = {name: metrics[f"routing/load/{name}/layer_{layer:02d}"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-12)


def test_even_load_violates_nothing_and_has_the_largest_entropy() -> None:
    routes = torch.arange(8).reshape(4, 1, 2)
    metrics = LoadSums.from_load(expert_load(routes, num_experts=8)).to_metrics()
    assert metrics["routing/load/max_violation"] == metrics["routing/load/cv"] == 0.0
    assert metrics["routing/load/entropy"] == pytest.approx(math.log(8), rel=1e-14)


@pytest.mark.parametrize("sizes", [[5], [2, 3], [0, 1, 4]], ids=str)
def test_merged_packs_equal_the_whole(sizes: list[int]) -> None:
    routes = torch.tensor(ROUTES)
    merged = reduce(Statistics.merge, [LoadSums.from_load(expert_load(part, 4)) for part in routes.split(sizes)])
    assert merged.to_metrics() == LoadSums.from_load(expert_load(routes, 4)).to_metrics()


def test_no_token_gives_no_figure() -> None:
    assert LoadSums.from_load(expert_load(torch.zeros(0, 3, 2, dtype=torch.uint8), 4)).to_metrics() == {}
