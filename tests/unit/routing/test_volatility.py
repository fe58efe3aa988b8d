"""Route changes against golden vectors and sets, for every integer type that a recorder may keep."""

import json
import math
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo_moe.errors import DataError
from gspo_moe.routing import PairSums, RouteSums, overlap_TL, volatility
from gspo_moe.routing.volatility import MARGIN_EDGES, log_shift_TL, set_change_NL

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


SEQUENCES, EXPERTS, TOPK, LAYERS = (7, 1, 12, 0, 30, 5), 24, 4, 3


def drawn(seed: int) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Router log-probs of two policies that differ a little, and each token's sequence; one sequence has no token."""
    random = np.random.default_rng(seed)
    old = random.normal(0, 1, (sum(SEQUENCES), LAYERS, EXPERTS))
    logits = {"old": old, "new": old + random.normal(0, 0.2, old.shape)}
    log_probs = {name: x - np.log(np.exp(x).sum(-1, keepdims=True)) for name, x in logits.items()}
    return log_probs, torch.arange(len(SEQUENCES)).repeat_interleave(torch.tensor(SEQUENCES))


def routes_of(log_probs: np.ndarray) -> np.ndarray:
    return np.argsort(-log_probs, axis=-1)[..., :TOPK]


def pair(seed: int) -> PairSums:
    log_probs, sequence_T = drawn(seed)
    routes = {name: routes_of(values) for name, values in log_probs.items()}
    old, new = (torch.tensor(routes[name]) for name in ("old", "new"))
    ordered = np.sort(log_probs["old"], axis=-1)[..., ::-1]
    margin = np.exp(ordered[..., TOPK - 1]) - np.exp(ordered[..., TOPK])
    of_old = {name: torch.tensor(np.take_along_axis(log_probs[name], routes["old"], -1)) for name in log_probs}
    return PairSums.of_pack(
        overlap_TL(old, new),
        set_change_NL(old, new, sequence_T, len(SEQUENCES), EXPERTS),
        sequence_T,
        TOPK,
        log_shift_TL(of_old["old"], of_old["new"]),
        torch.tensor(margin),
    )


def slowly(seed: int) -> dict[str, Any]:
    """The same by loops over sets."""
    log_probs, sequence_T = drawn(seed)
    old, new = (routes_of(log_probs[name]) for name in ("old", "new"))
    set_change = np.zeros((len(SEQUENCES), LAYERS))
    shift, margins, flips = [], [], []
    for layer in range(LAYERS):
        for sequence in range(len(SEQUENCES)):
            tokens = np.flatnonzero(sequence_T.numpy() == sequence)
            if len(tokens):
                was, now = ({*routes[tokens, layer].ravel().tolist()} for routes in (old, new))
                set_change[sequence, layer] = 1 - len(was & now) / len(was)
    for token in range(len(old)):
        gammas = []
        for layer in range(LAYERS):
            before, after = (log_probs[name][token, layer, old[token, layer]] for name in ("old", "new"))
            gammas.append(-np.abs(after - before).mean())
            best = sorted(np.exp(log_probs["old"][token, layer]))[::-1]
            margins.append(best[TOPK - 1] - best[TOPK])
            flips.append({*old[token, layer].tolist()} != {*new[token, layer].tolist()})
        shift.append(math.exp(np.mean(gammas)))
    bins = np.searchsorted(MARGIN_EDGES, margins, side="right")
    by_margin = [np.mean(np.array(flips)[bins == i]) if (bins == i).any() else np.nan for i in range(5)]
    used = sum(length > 0 for length in SEQUENCES)
    return {
        "response_set_change_by_layer": set_change.sum(axis=0) / used,
        "response_set_change": set_change.sum() / used / LAYERS,
        "router_shift": np.mean(shift),
        "router_margin": np.mean(margins),
        "router_margin_by_layer": np.reshape(margins, (-1, LAYERS)).mean(axis=0),
        "flip_rate_by_margin": by_margin,
    }


def test_all_figures_of_a_pair_match_loops_over_sets() -> None:
    metrics: dict[str, Any] = {**pair(1).to_metrics()}
    expected = slowly(1)
    assert set(metrics) == {*METRICS, "flip_rate_by_layer", *expected}
    assert 0 < metrics["response_set_change"] < metrics["flip_rate"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=0, atol=1e-10, err_msg=name)


def test_without_scores_their_figures_are_left_out() -> None:
    log_probs, sequence_T = drawn(2)
    old, new = (torch.tensor(routes_of(log_probs[name])) for name in ("old", "new"))
    change = set_change_NL(old, new, sequence_T, len(SEQUENCES), EXPERTS)
    found = PairSums.of_pack(overlap_TL(old, new), change, sequence_T, TOPK)
    names = {"response_set_change", "response_set_change_by_layer"}
    assert set(found.to_metrics()) == {*METRICS, "flip_rate_by_layer", *names}
    assert found.merge(pair(2)).to_metrics()["router_shift"] == pair(2).to_metrics()["router_shift"]


def test_the_shift_is_the_mean_change_of_log_probs_in_the_exponent() -> None:
    old = torch.tensor([[[0.5, 0.1]], [[0.2, 0.4]]], dtype=torch.float64).log()  # |change| (0, ln 4), (ln 2, ln 8)
    new = torch.tensor([[[0.5, 0.4]], [[0.4, 0.05]]], dtype=torch.float64).log()
    assert log_shift_TL(old, new).exp().tolist() == [[pytest.approx(0.5)], [pytest.approx(0.25)]]


def test_unmoved_scores_shift_nothing() -> None:
    log_probs = torch.randn(5, 2, 3, dtype=torch.float64)
    assert log_shift_TL(log_probs, log_probs).abs().max() == 0


def test_the_interval_over_sequences_covers_as_often_as_it_says() -> None:
    """Sequences that differ in how much they change: tokens are no sample of their own."""
    random, hits, widths = np.random.default_rng(5), 0, []
    for _ in range(200):
        changes = np.repeat(random.beta(1, 4, 60), lengths := random.integers(5, 15, 60))
        overlap = torch.tensor(random.random((lengths.sum(), 1)) > changes[:, None]).long()
        sequence_T = torch.arange(60).repeat_interleave(torch.tensor(lengths))
        found = PairSums.of_pack(overlap, torch.zeros(60, 1, dtype=torch.float64), sequence_T, topk=1)
        widths.append(found.interval())
        hits += abs(figures(found.to_metrics())[0] - 0.2) <= widths[-1]
    assert 180 <= hits <= 198
    alone = PairSums.of_pack(overlap[:5], torch.zeros(1, 1).double(), sequence_T[:5] * 0, topk=1)
    assert math.isnan(alone.interval())
