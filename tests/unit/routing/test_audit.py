"""The figures of a replay's audit against plain loops, and which faults they show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gspo_moe.routing.audit import ReplaySums, Run, alignment_faults, replay_sums, wrong_runs
from gspo_moe.routing.shards import StageLayers
from gspo_moe.routing.volatility import overlap_TL
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
    return replay_sums(pack(), replayed_TLK, live_TLK, live_TLK if at_rollout else None, LAYERS)


def faults(replayed_TLK: torch.Tensor, live_TLK: torch.Tensor, equal_weights: bool = True) -> list[str]:
    sums = sums_of(replayed_TLK, live_TLK)
    return list(alignment_faults(sums, equal_weights, wrong(replayed_TLK, live_TLK, sums)))


def wrong(replayed_TLK: torch.Tensor, live_TLK: torch.Tensor, sums: ReplaySums) -> list[Run]:
    return wrong_runs(pack(), overlap_TL(replayed_TLK, live_TLK), sums, LAYERS)


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
    assert replay_sums(one, None, live, live, LAYERS).to_metrics() == {}


@pytest.mark.parametrize(("judged", "count"), [((0, 1, 2), 3), ((1, 2), 1)])
def test_wrong_runs_are_those_of_plain_loops(judged: tuple[int, ...], count: int) -> None:
    """Of all layers, and of those beside one whose router has collapsed."""
    live, one = routes(1), pack()
    replayed = noisy(live)
    replayed[9:] = routes(2)[9:]
    if 0 not in judged:
        replayed[:, 0] = live[:, 0] = torch.tensor([0, 1], dtype=torch.uint8)
    sums = sums_of(replayed, live)
    least = 0.5 + 0.5 * sums.chance()[list(judged)].mean().item()
    expected = []
    for sample, (start, end) in enumerate(itertools.pairwise(one.cu_seqlens.tolist())):
        for sampled, each in itertools.groupby(range(start, end), lambda t: bool(one.route_mask_T[t])):
            rows = list(each)
            most = max(sum(shared(replayed[t, layer], live[t, layer]) for t in rows) for layer in judged)
            agreement = most / len(rows) / 2
            if len(rows) * 2 * len(judged) >= 32 and agreement < least:
                expected.append(Run(sample, rows[0] - start, rows[-1] + 1 - start, sampled, agreement))
    assert len(expected) == count
    assert wrong(replayed, live, sums) == expected


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
    # The prompt of 5 tokens has 30 slots, too few.
    assert fault.startswith("sample 0, tokens 5 to 13 (a turn of the policy's)")


def collapsed(first: torch.Tensor, tokens: int = 43) -> torch.Tensor:
    return first.to(torch.uint8).expand(tokens, 3, 2).clone()


@pytest.mark.parametrize("flips", [1, 3, 8])
@pytest.mark.parametrize("layers", [(0,), (0, 1, 2)])
def test_a_collapsed_layer_raises_no_alarm(flips: int, layers: tuple[int, ...]) -> None:
    """The engine gives two experts to all tokens, the live router another one to some at the end of a sequence."""
    live = routes(1)
    replayed = noisy(live)
    replayed[:, layers] = collapsed(torch.tensor([0, 1]))[:, layers]
    live[:, layers] = replayed[:, layers]
    live[14 - flips : 14, layers, 1] = 2
    sums = sums_of(replayed, live)
    assert sums.chance()[0] == pytest.approx(1 - flips / 86)
    assert sums.judged() == [layer for layer in range(3) if layer not in layers]
    for equal_weights in (True, False):
        assert faults(replayed, live, equal_weights) == []


def test_few_slots_are_not_judged() -> None:
    """A run of 4 tokens at two experts, all of whose near ties flipped."""
    live, start = routes(1), sum(LENGTHS[:2]) - 2
    replayed = live.clone()
    replayed[start + 10 : start + 14] = routes(2)[start + 10 : start + 14]
    assert faults(replayed, live) == []


def test_sums_of_packs_add_up() -> None:
    live = routes(1)
    one, other = sums_of(noisy(live), live), sums_of(live, live)
    merged: dict[str, Any] = one.merge(other).to_metrics()
    assert merged["routing/replay/forced"] == pytest.approx(one.to_metrics()["routing/replay/forced"] / 2, rel=1e-14)
