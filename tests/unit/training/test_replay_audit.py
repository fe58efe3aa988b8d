"""Whole RL steps under Routing Replay: what its audit logs, and faults that are planted in it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from gspo_moe.errors import TrainingError
from gspo_moe.model.router import PaddingAwareRouter
from gspo_moe.routing import audit
from gspo_moe.routing.recorder import routers_of
from gspo_moe.routing.replay import RouterReplay, _PackReplay
from gspo_moe.training import learn, old_policy
from gspo_moe.training.packs import TrainingPack
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer
from tests.unit.training.test_old_policy import opened


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    settings = (
        "algorithm.name=grpo",
        "routing.replay=r3",
        "algorithm.mini_batches=2",
        "optimizer.clip_grad=0",
        "optimizer.lr=1e-4",
    )
    with opened(tmp_path_factory.mktemp("audit"), *settings) as trainer:
        yield trainer


def test_a_sound_step_is_covered_aligned_and_teaches_the_router(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    taken = learn.train_minibatch

    def watched(*arguments: Any) -> Any:
        result = taken(*arguments)
        weights = [weight for router in routers_of(trainer.session.model.chunks) for weight in router.parameters()]
        squares = [float(weight.main_grad.double().square().sum()) for weight in weights]
        norms.append(math.sqrt(sum(squares)))
        return result

    monkeypatch.setattr(learn, "train_minibatch", watched)
    metrics = rl_step(trainer).metrics
    found = {name.removeprefix("routing/replay/"): metrics[name] for name in metrics if "/replay/" in name}
    assert found["coverage"] == found["consumed"] == found["aligned"] == 1
    assert 0 <= found["forced"] < 0.05
    assert found["aligned_shifted"] < 0.8
    assert found["aligned_by_chance"] < 0.8
    assert found["router_grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-6)
    assert 0 < found["router_grad_norm"] < metrics["optimizer/grad_norm"]


Change = Callable[[torch.Tensor], torch.Tensor]


def shifted(routes_TLK: torch.Tensor) -> torch.Tensor:
    return routes_TLK.roll(1, dims=0)


def layer_filled(routes_TLK: torch.Tensor) -> torch.Tensor:
    """As an engine that reports nothing of a layer and fills it up."""
    found = routes_TLK.clone()
    found[:, 1] = torch.tensor([6, 7], dtype=found.dtype)
    return found


def layer_lost(routes_TLK: torch.Tensor) -> torch.Tensor:
    return routes_TLK[:, :1]


def halves_swapped(routes_TLK: torch.Tensor) -> torch.Tensor:
    return routes_TLK.roll(len(routes_TLK) // 2, dims=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "routing.replay=r3: replayed routes are shifted by one token"),
        (layer_filled, r"MoE layers 1 \(\d+%\) are not those layers'"),
        (layer_lost, r"pack 0 are of 1 MoE layers, and this pipeline stage has 2 \(0, 1\)"),
        (halves_swapped, r"sample \d+, tokens \d+ to \d+ \(.*\): replayed routes are not these tokens'"),
    ],
)
def test_routes_that_are_not_their_tokens_end_the_run(
    change: Change, message: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = old_policy.engine_routes
    monkeypatch.setattr(audit, "FEWEST_SLOTS", 16)  # answers are of 8 tokens
    monkeypatch.setattr(old_policy, "engine_routes", lambda *given: [change(one) for one in reported(*given)])
    with pytest.raises(TrainingError, match=message):
        rl_step(trainer)


def test_the_audit_can_warn_or_be_off_and_tells_its_figures(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reported = old_policy.engine_routes
    monkeypatch.setattr(old_policy, "engine_routes", lambda *given: [shifted(one) for one in reported(*given)])
    told = (
        r"shifted by one token: .* \(aligned 0\.\d+, aligned_by_chance 0\.\d+, aligned_shifted 0\.\d+\); .*audit=warn"
    )
    with pytest.raises(TrainingError, match=told):
        rl_step(trainer)
    for how, count in (("warn", 1), ("off", 0)):
        caplog.clear()
        audited(trainer, monkeypatch, how)
        metrics = rl_step(trainer).metrics
        assert metrics["routing/replay/aligned_shifted"] > metrics["routing/replay/aligned"]
        found = [record for record in caplog.records if record.name == "gspo_moe.training.replay_audit"]
        assert len(found) == count
        assert all(re.search(told, record.getMessage()) for record in found)


def audited(trainer: Trainer, patch: pytest.MonkeyPatch, how: str) -> None:
    session = trainer.session
    routing = session.config.routing.model_copy(update={"audit": how})
    patch.setattr(session, "plan", replace(session.plan, config=session.config.model_copy(update={"routing": routing})))


def test_a_first_mini_batch_that_was_skipped_is_not_judged(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward was not finite: live routes are arbitrary, and its routers' gradient norm is none."""
    taken, reported, norms = learn.train_minibatch, old_policy.engine_routes, list[float | None]()

    def skipped(*arguments: Any) -> Any:
        result = taken(*arguments)
        norms.append(result.update.router_grad_norm)
        if len(norms) == 2:
            return result
        return replace(result, update=replace(result.update, skipped=True, router_grad_norm=math.nan))

    monkeypatch.setattr(learn, "train_minibatch", skipped)
    monkeypatch.setattr(learn, "dump_skipped", lambda *given: None)
    monkeypatch.setattr(old_policy, "engine_routes", lambda *given: [layer_filled(one) for one in reported(*given)])
    assert rl_step(trainer).metrics["routing/replay/router_grad_norm"] == norms[1]


def test_answers_of_a_bank_are_of_weights_that_nobody_knows(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank's answers say version 0, as step 1 does, whatever model made them: only a shift would be an error."""
    session, reported = trainer.session, old_policy.engine_routes
    monkeypatch.setattr(old_policy, "engine_routes", lambda *given: [layer_filled(one) for one in reported(*given)])
    rollout = session.config.rollout.model_copy(update={"bank": "bank.safetensors"})
    _ = session.answerer  # of the engine, as there is no such bank
    monkeypatch.setattr(
        session, "plan", replace(session.plan, config=session.config.model_copy(update={"rollout": rollout}))
    )
    assert rl_step(trainer).metrics["routing/replay/aligned"] < 0.9


def test_a_mini_batch_without_routes_is_named(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn.with_old_policy

    def without(of: Trainer, packs: Sequence[TrainingPack]) -> list[TrainingPack]:
        return [replace(one, replay_TLK=None) if one.minibatch else one for one in whole(of, packs)]

    monkeypatch.setattr(learn, "with_old_policy", without)
    with pytest.raises(TrainingError, match=r"routing\.replay=r3: mini-batch 2 had no routes to replay"):
        rl_step(trainer)


def test_a_router_that_leaves_the_routes_out_is_named(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers' faults: replay switched on and bypassed, in part or whole, or taken and overruled."""

    def bypassed(of: _PackReplay, scores: Any, topk: int, groups: Any, group: Any, choose: Any) -> Any:
        return choose(scores, topk, num_groups=groups, group_topk=group)

    def overruled(of: _PackReplay, scores: Any, topk: int, groups: Any, group: Any, choose: Any) -> Any:
        taken(of, scores, topk, groups, group, choose)
        indices = (scores.argsort(dim=1)[:, :topk]).contiguous()
        return scores.gather(1, indices), indices

    def twice(of: _PackReplay, *given: Any) -> Any:
        taken(of, *given)
        return taken(of, *given)

    taken = _PackReplay.get_replay_topk
    for fault, message in (
        (bypassed, "MoE layer 0 took the routes of pack 0 0 times in one forward pass, not once"),
        (twice, "MoE layer 0 took the routes of pack 0 2 times"),
        (overruled, "MoE layers 0, 1 picked other experts than those replayed"),
    ):
        monkeypatch.setattr(_PackReplay, "get_replay_topk", fault)
        with pytest.raises(TrainingError, match=message):
            rl_step(trainer)
    assert RouterReplay.global_router_replay_instances == []


def test_routers_without_a_gradient_are_named(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = PaddingAwareRouter.routing

    def detached(router: PaddingAwareRouter, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = routing(router, *given, **named)
        return weights.detach(), chosen

    monkeypatch.setattr(PaddingAwareRouter, "routing", detached)
    with pytest.raises(TrainingError, match="routers got no gradient, though they weigh the replayed experts"):
        rl_step(trainer)


def test_recomputation_that_takes_no_routes_is_named(trainer: Trainer) -> None:
    config = trainer.session.model.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "recompute_granularity", "selective")
        patch.setattr(config, "recompute_modules", [])
        with pytest.raises(TrainingError, match="recomputation was to take were left over \\(0: "):
            rl_step(trainer)
    rl_step(trainer)
