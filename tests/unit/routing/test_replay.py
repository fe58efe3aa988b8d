"""Routing Replay in one process; other layouts are in tests/distributed/test_policy_layouts.py."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.errors import DataError
from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.routing.recorder import RouteRecorder, routers_of
from gspo_moe.routing.replay import Replayed, RouterReplay, check_routes, replay
from gspo_moe.scoring.score import score
from gspo_moe.types import Microbatch, TrainingSample
from tests.policy import SIZES, packs_of, score_and_record, trained
from tests.qwen3 import architecture, layout, random_sequences
from tests.steps import train_minibatch

LENGTHS = (9, 4, 13, 6, 2)
GRPO = AlgorithmConfig(name="grpo")


def packs(sizes: Architecture = SIZES) -> list[Microbatch]:
    samples = [
        TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1), advantage=(-1.0) ** number * (1 + number / 3))
        for number, ids in enumerate(random_sequences(sizes, LENGTHS, seed=7))
    ]
    return packs_of(samples, per_pack=2)


def foreign(seed: int = 3, sizes: Architecture = SIZES) -> list[torch.Tensor]:
    """Experts drawn at random, in no order, for every token and layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(pack.num_tokens, sizes.num_hidden_layers, sizes.num_experts) for pack in packs(sizes)]
    drawn = [torch.rand(shape, generator=generator).argsort(dim=-1) for shape in shapes]
    return [order[..., : sizes.num_experts_per_tok].to(torch.int16) for order in drawn]


def main_grad(parameter: Any) -> torch.Tensor:
    gradient: torch.Tensor = parameter.main_grad
    return gradient


def in_part(gates: bool = True) -> list[Replayed]:
    """Foreign routes, with weights of their own, in two of three rows of a layer."""
    found = []
    for number, routes_TLK in enumerate(foreign()):
        drawn = torch.rand(routes_TLK.shape, generator=torch.Generator().manual_seed(number)) + 0.1
        held_TL = (torch.arange(len(routes_TLK))[:, None] + torch.arange(routes_TLK.shape[1])) % 3 > 0
        found.append(Replayed(routes_TLK, drawn if gates else None, held_TL))
    return found


def gradients(recompute: str, routes: Sequence[torch.Tensor | Replayed] | None) -> tuple[list[torch.Tensor], Any]:
    config = Config.model_validate({"parallel": {"recompute": recompute}})
    with trained(config, layout()) as (model, optimizer):
        old = score(model, packs(), routes=routes)
        result = train_minibatch(model, optimizer, packs(), old, GRPO, len(LENGTHS), 1.0, None, replayed=routes)
        assert RouterReplay.global_router_replay_instances == []
        return [main_grad(parameter).clone() for parameter in model.chunks[0].parameters()], result


@pytest.fixture
def model() -> Iterator[Model]:
    with trained(Config(), layout()) as (model, _):
        yield model


@pytest.mark.parametrize(("num_experts", "topk"), [(8, 2), (320, 40)])
def test_its_own_routes_in_any_order_give_the_same_bits(num_experts: int, topk: int) -> None:
    sizes = architecture(
        num_experts=num_experts, num_experts_per_tok=topk, moe_intermediate_size=4, initializer_range=0.25
    )
    with trained(Config(), layout(), sizes) as (model, _):
        recorder = RouteRecorder(model.chunks, sizes, model.groups)
        free, recordings = score_and_record(model, packs(sizes), recorder)
        own = [recording.routes_TLK for recording in recordings]
        for routes in (own, [routes.flip(-1) for routes in own]):
            replayed = score(model, packs(sizes), routes=routes)
            assert all(torch.equal(a, b) for a, b in zip(free, replayed, strict=True))
        other = score(model, packs(sizes), routes=foreign(sizes=sizes))
        assert not any(torch.equal(a, b) for a, b in zip(free, other, strict=True))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_at_equal_weights_ratios_are_exactly_one(recompute: str) -> None:
    _, result = gradients(recompute, foreign())
    metrics = result.statistics.to_metrics()
    assert metrics["ratio/token_min"] == metrics["ratio/token_max"] == metrics["ratio/sequence_min"] == 1
    assert metrics["ratio/token_std"] == metrics["ratio/sequence_std"] == 0


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_replays_each_pack_its_own_routes(recompute: str) -> None:
    expected, _ = gradients("none", foreign())
    found, _ = gradients(recompute, foreign())
    free, _ = gradients("none", None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(not torch.allclose(a, b) for a, b in zip(free, expected, strict=True)) > 10


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_replays_weights_and_live_rows_too(recompute: str) -> None:
    expected, _ = gradients("none", in_part())
    found, result = gradients(recompute, in_part())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert result.statistics.to_metrics()["ratio/token_std"] == 0
    other, _ = gradients("none", in_part(gates=False))
    assert sum(not torch.allclose(a, b) for a, b in zip(other, expected, strict=True)) > 10


def test_replayed_weights_leave_the_router_no_say(model: Model) -> None:
    """With its own weights replayed a pass has the same bits whatever becomes of the routers."""
    recorder = RouteRecorder(model.chunks, SIZES, model.groups, scores=True, gates=True)
    free, recordings = score_and_record(model, packs(), recorder)
    own = [(one.routes_TLK, one.own.gates_TLK) for one in recordings if one.own is not None]
    held = score(model, packs(), routes=[Replayed(*one) for one in own])
    assert all(torch.equal(a, b) for a, b in zip(free, held, strict=True))
    with torch.no_grad():
        for router in routers_of(model.chunks):
            router.weight.mul_(-0.5)
    held = score(model, packs(), routes=[Replayed(*one) for one in own])
    assert all(torch.equal(a, b) for a, b in zip(free, held, strict=True))
    experts_only = score(model, packs(), routes=[routes for routes, _ in own])
    assert not any(torch.equal(a, b) for a, b in zip(free, experts_only, strict=True))


def test_rows_that_are_not_held_route_live(model: Model) -> None:
    free, whole = score(model, packs()), score(model, packs(), routes=foreign())
    for held, expected in ((False, free), (True, whole)):
        routes = [Replayed(one, None, torch.full(one.shape[:2], held)) for one in foreign()]
        assert all(torch.equal(a, b) for a, b in zip(score(model, packs(), routes=routes), expected, strict=True))
    seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def keep(router: Any, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        assert router.weights_PE is not None
        seen.append((router.layer_number - 1, logits, chosen.clone(), router.weights_PE.clone()))

    for router in routers_of(model.chunks):
        router.observers += (keep,)
    score(model, packs(), routes=in_part())
    assert len(seen) == 2 * len(packs())
    for number, (layer, logits, chosen, weights) in enumerate(seen):
        one = in_part()[number // 2]
        assert one.gates_TLK is not None
        assert one.held_TL is not None
        for token, row in enumerate(logits.double()):
            live = row.topk(2)
            experts, gates = live.indices, live.values.softmax(dim=0)
            if one.held_TL[token, layer]:
                experts, gates = one.routes_TLK[token, layer].long(), one.gates_TLK[token, layer].double()
            assert set(chosen[token].nonzero()[:, 0].tolist()) == set(experts.tolist())
            torch.testing.assert_close(weights[token][experts].double(), gates, atol=1e-6, rtol=0)


def test_experts_are_the_given_ones_and_weights_the_live_routers(model: Model) -> None:
    routes = foreign()
    seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def keep(router: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        logits = inputs[0].detach().double().flatten(0, 1) @ router.weight.detach().double().T
        seen.append((router.layer_number - 1, logits, *output))

    for router in routers_of(model.chunks):
        router.register_forward_hook(keep)
    score(model, packs(), routes=routes)
    assert len(seen) == 2 * len(routes)
    for number, (layer, logits, weights, chosen) in enumerate(seen):
        experts = routes[number // 2][:, layer].long()
        expected = torch.zeros_like(logits).scatter(1, experts, logits.gather(1, experts).softmax(dim=1))
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, experts, True))
        torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=0)


def test_the_router_learns_through_its_weights() -> None:
    """The loss under held routes is smooth in the router, so central differences give its gradient."""
    routes = foreign()
    with trained(Config.model_validate({"optimizer": {"clip_grad": 0.0}}), layout()) as (model, optimizer):
        old = score(model, packs(), routes=routes)
        router = routers_of(model.chunks)[0]
        before = router.weight.detach().clone()
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(before.shape, generator=generator)

        def loss(step: float) -> float:
            with torch.no_grad():
                router.weight.copy_(before + step * direction)
            total = 0.0
            for pack, new, reference in zip(packs(), score(model, packs(), routes=routes), old, strict=True):
                ratio = (new.double() - reference.double()).exp()
                means = [part.mean() for part in ratio.split(pack.cu_seqlens.diff().tolist())]
                total -= float((torch.stack(means) * pack.advantages_N).sum()) / len(LENGTHS)
            return total

        slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
        loss(0.0)
        train_minibatch(model, optimizer, packs(), old, GRPO, len(LENGTHS), 1.0, None, replayed=routes)
        gradient = (main_grad(router.weight) * direction).sum().item()
    assert abs(slope) > 0.01
    assert gradient == pytest.approx(slope, rel=1e-2)


def test_depth_holds_the_first_layers_only(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    free, recordings = score_and_record(model, packs(), recorder)
    own = [recording.routes_TLK.short() for recording in recordings]
    mixed = [torch.stack([mine[:, 0], other[:, 1]], dim=1) for mine, other in zip(own, foreign(), strict=True)]
    held = score(model, packs(), routes=mixed, depth=1)
    assert all(torch.equal(a, b) for a, b in zip(free, held, strict=True))
    held = score(model, packs(), routes=mixed)
    assert not any(torch.equal(a, b) for a, b in zip(free, held, strict=True))


def test_the_recorder_keeps_what_the_router_would_have_picked_itself(model: Model) -> None:
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    free, found = (
        [recording.routes_TLK.sort(dim=-1).values for recording in recordings]
        for _, recordings in (score_and_record(model, packs(), recorder, routes=routes) for routes in (None, foreign()))
    )
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(free, found, strict=True))
    assert not all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(free, found, strict=True))


def test_a_pass_that_fails_leaves_no_replay_behind(model: Model) -> None:
    expected = score(model, packs())
    with (
        pytest.raises(ZeroDivisionError),
        replay(model.chunks, model.groups, foreign(), no_recording) as scope,
        scope(0, model.chunks[0], ContextSplit(packs()[0].cu_seqlens)),
    ):
        raise ZeroDivisionError
    assert [router.router_replay for router in routers_of(model.chunks)] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(score(model, packs()), expected, strict=True))


def sample_with(routes: torch.Tensor | None) -> TrainingSample:
    return TrainingSample((3, 4, 5, 6), (0, 1, 1, 1), routes=routes)


GOOD = torch.tensor([[[0, 1], [7, 2]], [[3, 1], [0, 4]], [[5, 6], [2, 3]]], dtype=torch.uint8)


def changed(token: int, layer: int, experts: list[int]) -> torch.Tensor:
    routes = GOOD.short()
    routes[token, layer] = torch.tensor(experts, dtype=torch.int16)
    return routes


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (None, "sample 1 has no routes"),
        (GOOD[:2], r"sample 1: routes \[2, 2, 2\] .* do not fit its 4 tokens.*\[3 "),
        (GOOD[:, :1], r"sample 1: routes \[3, 1, 2\].*layers 0 to 1"),
        (GOOD[..., :1], r"sample 1: routes \[3, 2, 1\].*top-2"),
        (GOOD.float(), r"sample 1: .* of torch.float32"),
        (changed(2, 1, [3, 8]), r"sample 1, layer 1, token 2: routes \[3, 8\] are not 2 different experts of 0 to 7"),
        (changed(0, 0, [-1, 2]), r"sample 1, layer 0, token 0: routes \[-1, 2\]"),
        (changed(1, 0, [6, 6]), r"sample 1, layer 0, token 1: routes \[6, 6\]"),
    ],
)
def test_routes_that_cannot_be_the_tokens_are_refused(routes: torch.Tensor | None, message: str) -> None:
    check_routes(enumerate([sample_with(GOOD), replace(sample_with(GOOD), advantage=1.0)]), SIZES)
    with pytest.raises(DataError, match=message):
        check_routes(enumerate([sample_with(GOOD), sample_with(routes)]), SIZES)
