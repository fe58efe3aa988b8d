"""The figures of a replay's audit against plain loops, and which faults they show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gspo_moe.routing.audit import ReplaySums, alignment_faults, replay_sums, runs
from gspo_moe.routing.shards import StageLayers
from gspo_moe.types import Microbatch, TrainingSample
from tests.policy import packs_of
from tests.qwen3 import architecture, random_sequences

SIZES = architecture(num_hidden_layers=3, num_experts=8, num_experts_per_tok=2)
LENGTHS = (15, 9, 22)
# Prompt, a turn, what an environment says, another turn.
MASKS = ((0,) * 5 + (1,) * 10, (0,) * 5 + (1,) * 4, (0,) * 4 + (1,) * 6 + (0,) * 4 + (1,) * 8)


class OneStage:
    """Where StageLayers asks for its groups."""

    class pipeline:
        @staticmethod
        def size() -> int:
            return 1


LAYERS = StageLayers((0, 1, 2), SIZES, OneStage())  # type: ignore[arg-type]


def pack() -> Microbatch:
    sequences = random_sequences(SIZES, LENGTHS, seed=3)
    samples = [TrainingSample(tuple(ids.tolist()), mask) for ids, mask in zip(sequences, MASKS, strict=True)]
    (found,) = packs_of(samples, per_pack=3)
    return found


def routes(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS) - len(LENGTHS)
    return torch.rand(tokens, 3, 8, generator=generator).argsort(dim=-1)[..., :2].to(torch.uint8)


def noisy(live_TLK: torch.Tensor, every: int = 7) -> torch.Tensor:
    """One slot of every seventh token's second layer is another expert."""
    found = live_TLK.clone()
    for token in range(0, len(found), every):
        taken = set(found[token, 1].tolist())
        found[token, 1, 0] = next(expert for expert in range(8) if expert not in taken)
    return found


def sums_of(replayed_TLK: torch.Tensor, live_TLK: torch.Tensor, at_rollout: bool = True) -> ReplaySums:
    return replay_sums(pack(), replayed_TLK, live_TLK, at_rollout, LAYERS)


def faults(replayed_TLK: torch.Tensor, live_TLK: torch.Tensor, equal_weights: bool = True) -> list[str]:
    found = runs(pack(), replayed_TLK, live_TLK, LAYERS)
    return list(alignment_faults(sums_of(replayed_TLK, live_TLK), equal_weights, found))


def shared(one: torch.Tensor, other: torch.Tensor) -> int:
    return len(set(one.tolist()) & set(other.tolist()))


def test_figures_are_those_of_plain_loops() -> None:
    live, one = routes(1), pack()
    replayed = noisy(live)
    sums = sums_of(replayed, live).to_metrics()
    slots = len(live) * 3 * 2
    own = sum(shared(replayed[t, layer], live[t, layer]) for t in range(len(live)) for layer in range(3))
    assert sums["routing/replay/forced"] == pytest.approx(1 - own / slots, rel=1e-14)
    assert sums["routing/replay/aligned"] == pytest.approx(own / slots, rel=1e-14)
    beside: dict[int, list[int]] = {-1: [], 1: []}
    for start, end in itertools.pairwise(one.cu_seqlens.tolist()):
        for step, t in itertools.product((-1, 1), range(start, end)):
            if start <= t + step < end:
                beside[step] += [shared(replayed[t + step, layer], live[t, layer]) for layer in range(3)]
    most = max(sum(each) / len(each) / 2 for each in beside.values())
    assert sums["routing/replay/aligned_shifted"] == pytest.approx(most, rel=1e-14)
    chance = 0.0
    for layer in range(3):
        load = [[(each[:, layer] == e).sum().item() / len(live) for e in range(8)] for each in (replayed, live)]
        chance += sum(a * b for a, b in zip(*load, strict=True)) / 2 / 3
    assert sums["routing/replay/aligned_by_chance"] == pytest.approx(chance, rel=1e-14)
    later = sums_of(replayed, live, at_rollout=False).to_metrics()
    assert later == {"routing/replay/forced": pytest.approx(1 - own / slots, rel=1e-14)}
    assert replay_sums(one, None, live, True, LAYERS).to_metrics() == {}
    for run in runs(one, replayed, live, LAYERS):
        begin = int(one.cu_seqlens[run.sample]) + run.start
        rows = range(begin, begin + run.stop - run.start)
        best = max(sum(shared(replayed[t, layer], live[t, layer]) for t in rows) for layer in range(3))
        assert run.agreement == pytest.approx(best / len(rows) / 2, rel=1e-14)
        assert {bool(one.route_mask_T[t]) for t in rows} == {run.sampled}


def test_an_engine_that_rounds_is_no_fault() -> None:
    live = routes(1)
    for replayed in (live, noisy(live), noisy(live, every=2)):
        assert faults(replayed, live) == []


@pytest.mark.parametrize("equal_weights", [True, False])
@pytest.mark.parametrize(("by", "which"), [(1, "before it"), (-1, "behind it")])
def test_a_shift_by_one_token_is_named(by: int, which: str, equal_weights: bool) -> None:
    live = routes(1)
    (fault,) = faults(noisy(live.roll(by, dims=0)), live, equal_weights)
    assert "shifted by one token" in fault
    assert f"for the token {which}" in fault


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_that_has_anothers_routes_is_named(layer: int) -> None:
    live = routes(1)
    replayed = noisy(live)
    replayed[:, layer] = routes(2)[:, layer]
    (fault,) = faults(replayed, live)
    assert fault.startswith(f"replayed routes of MoE layers {layer} (")


def test_a_turn_that_was_dropped_is_named_by_sample_and_tokens() -> None:
    """The third sample's first turn left out and the rest moved up, filled at the end: what peers' faults leave."""
    live, start = routes(1), sum(LENGTHS[:2]) - 2
    replayed = noisy(live)
    kept = torch.cat([replayed[start : start + 4], replayed[start + 10 :], routes(5)[:6]])
    replayed[start:] = kept
    (fault,) = faults(replayed, live)
    assert fault.startswith("sample 2, tokens 4 to 9 (a turn of the policy's): replayed routes are not these tokens'")
    assert faults(replayed, live, equal_weights=False) == []


def test_routes_of_other_answers_are_named() -> None:
    (fault,) = faults(routes(2), routes(1))
    assert fault.startswith("sample 0, tokens 0 to 4 (prompt, or between turns)")


def test_sums_of_packs_add_up() -> None:
    live = routes(1)
    one, other = sums_of(noisy(live), live), sums_of(live, live)
    merged: dict[str, Any] = one.merge(other).to_metrics()
    assert merged["routing/replay/forced"] == pytest.approx(one.to_metrics()["routing/replay/forced"] / 2, rel=1e-14)
