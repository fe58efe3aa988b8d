"""Predictive Routing Replay in one process; other layouts are in tests/distributed/test_predictor_layouts.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.errors import TrainingError
from gspo_moe.model.build import Model
from gspo_moe.model.sharded import weight_shards
from gspo_moe.routing.prediction import Foretold, Lesson, Seen, lesson_of
from gspo_moe.routing.recorder import routers_of
from gspo_moe.scoring.score import score
from gspo_moe.training import learn, rl
from gspo_moe.training.batch import Batch
from gspo_moe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gspo_moe.training.packs import TrainingPack
from gspo_moe.training.predictor import Predictor
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer
from gspo_moe.types import Microbatch, TrainingSample
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import layout, random_sequences
from tests.unit.training.test_old_policy import compare, run
from tests.unit.training.test_old_policy import opened as on_random_rewards

CONFIG = Config.model_validate(
    {"algorithm": {"mini_batches": 2}, "routing": {"replay": "predict"}, "optimizer": {"lr": 1e-4, "weight_decay": 0.1}}
)
FEW = ("algorithm.mini_batches=4", "algorithm.name=grpo", "optimizer.lr=1e-3")


def opened(folder: Path, *overrides: str) -> contextlib.AbstractContextManager[Trainer]:
    return on_random_rewards(folder, "routing.replay=predict", *overrides)


def cut(batch: Batch, length: Callable[[int], int]) -> Batch:
    """The same with each answer's first `length(index)` tokens alone."""
    samples = []
    for index, one in enumerate(batch.samples):
        end, log_probs = one.response_mask.index(1) + length(index), one.rollout_log_probs[: length(index)]
        ids, mask = one.token_ids[:end], one.response_mask[:end]
        samples.append(replace(one, token_ids=ids, response_mask=mask, rollout_log_probs=log_probs))
    return replace(batch, samples=tuple(samples))


def packs() -> list[Microbatch]:
    samples = [
        TrainingSample(tuple(ids.tolist()), (0, 0) + (1,) * (len(ids) - 2), advantage=1.0)
        for ids in random_sequences(SIZES, (9, 4, 13, 6, 3), seed=7)
    ]
    return packs_of(samples, per_pack=2)


def drawn(predictor: Predictor, scale: float = 0.3) -> Predictor:
    for number, weight in enumerate(predictor.weights):
        weight.copy_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return predictor


def foretell(model: Model, predictor: Predictor) -> tuple[list[Foretold], list[torch.Tensor]]:
    forced = predictor.start(None, forced=True)
    log_probs = score(model, packs(), record=forced)
    return forced.foretold(), log_probs


def drifted(model: Model) -> None:
    for router in routers_of(model.chunks):
        noise = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(router.layer_number))
        router.weight.data += 0.05 * noise


def test_foretold_are_the_best_of_the_moved_logits_and_the_pass_runs_with_them() -> None:
    with trained(CONFIG, layout()) as (model, optimizer):
        assert optimizer.predictor is not None
        predictor = drawn(optimizer.predictor)
        found, log_probs = foretell(model, predictor)
        moved = 0
        for one in found:
            for number, router in enumerate(routers_of(model.chunks)):
                seen, weight_EH = one.seen[number], predictor.weights[number].double()
                logits_PE = seen.hidden_PH.double() @ router.weight.double().T
                assert torch.allclose(logits_PE, seen.logits_PE.double(), atol=1e-5)
                expected = (logits_PE + seen.hidden_PH.double() @ weight_EH.T).topk(2).indices
                routes_TK = one.routes_TLK[:, number].long()
                assert torch.equal(routes_TK.sort(dim=1).values, expected[: len(routes_TK)].sort(dim=1).values)
                moved += (routes_TK.sort(1).values != logits_PE.topk(2).indices.sort(1).values[: len(routes_TK)]).sum()
        assert moved > 20
        replayed = score(model, packs(), routes=[one.routes_TLK for one in found])
        assert all(torch.equal(a, b) for a, b in zip(log_probs, replayed, strict=True))
        free = score(model, packs())
        assert not any(torch.equal(a, b) for a, b in zip(log_probs, free, strict=True))


def lesson(model: Model, predictor: Predictor, found: Sequence[Foretold]) -> tuple[Lesson, list[list[torch.Tensor]]]:
    """Of a forward at the weights as they are, and its logits by pack and layer."""
    logits: list[list[torch.Tensor]] = []

    def keep(router: Any, logits_PE: torch.Tensor, chosen: torch.Tensor) -> None:
        if router is routers_of(model.chunks)[0]:
            logits.append([])
        logits[-1].append(logits_PE.double().clone())

    taught = predictor.lesson([(one, pack.route_mask_T) for one, pack in zip(found, packs(), strict=True)], None)
    for router in routers_of(model.chunks):
        router.observers = (keep,)
    score(model, packs(), record=taught, routes=[one.routes_TLK for one in found])
    for router in routers_of(model.chunks):
        router.observers = ()
    return taught, logits


def test_steps_are_adams_on_the_mean_divergence_of_sampled_tokens() -> None:
    """Against autograd and Adam's formula in float64."""
    with trained(CONFIG, layout()) as (model, optimizer):
        assert optimizer.predictor is not None
        predictor = drawn(optimizer.predictor)
        expected = [weight.double() for weight in predictor.weights]
        moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one in expected]
        for step in range(1, 4):
            found, _ = foretell(model, predictor)
            drifted(model)
            taught, logits = lesson(model, predictor, found)
            metrics = predictor.learn(taught, 1e-4).to_metrics()
            divergence, unchanged = 0.0, 0.0
            for number, weight in enumerate(expected):
                variable = weight.clone().requires_grad_()
                loss, before = mean_divergence(number, variable, found, logits)
                loss.backward()
                assert variable.grad is not None
                mean, square = moments[number]
                mean.mul_(0.9).add_(0.1 * variable.grad)
                square.mul_(1 - 0.05).add_(0.05 * variable.grad.square())
                ahead = (square / (1 - 0.95**step)).sqrt() + 1e-8
                weight -= 0.1 * (mean / (1 - 0.9**step)) / ahead
                divergence += loss.item() / len(expected)
                unchanged += before.item() / len(expected)
            assert metrics["routing/predictor/kl"] == pytest.approx(divergence, rel=1e-5)
            assert metrics["routing/predictor/kl_unchanged"] == pytest.approx(unchanged, rel=1e-4)
            for weight, other in zip(predictor.weights, expected, strict=True):
                assert (weight.double() - other).abs().quantile(0.99) < 1e-4
                weight.copy_(other)
        assert predictor.steps == 3


def mean_divergence(
    number: int, weight_EH: torch.Tensor, found: Sequence[Foretold], logits: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    sums, tokens = [torch.zeros((), dtype=torch.float64)] * 2, 0
    for one, pack, of_pack in zip(found, packs(), logits, strict=True):
        seen = one.seen[number]
        for token in pack.route_mask_T.nonzero()[:, 0].tolist():
            old_E, h_H = seen.logits_PE[token].double(), seen.hidden_PH[token].double()
            now_E, tokens = of_pack[number][token], tokens + 1
            for place, guess in enumerate((old_E + weight_EH @ h_H, old_E)):
                divergence = (now_E.softmax(0) * (now_E.log_softmax(0) - guess.log_softmax(0))).sum()
                sums[place] = sums[place] + divergence
    return sums[0] / tokens, sums[1] / tokens


def test_a_drift_that_is_linear_in_the_hidden_state_is_learnt() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden_PH, logits_PE, drift_EH = (torch.randn(*size, generator=generator) for size in ((400, 6), (400, 8), (8, 6)))
    weight_EH = torch.zeros(8, 6)
    adam = torch.optim.Adam([weight_EH], lr=0.02)
    seen, mask_P1 = Seen(hidden_PH, logits_PE), torch.arange(400)[:, None] % 3 > 0
    for _ in range(400):
        gradient_EH, sums_3 = lesson_of(seen, weight_EH, logits_PE + 0.3 * hidden_PH @ drift_EH.T, mask_P1)
        weight_EH.grad = gradient_EH / sums_3[2].float()
        adam.step()
    assert sums_3[2] == mask_P1.sum()
    assert sums_3[0] < 1e-3 * sums_3[1]
    # Softmax does not tell a constant from none.
    assert torch.allclose(weight_EH - weight_EH.mean(0), 0.3 * (drift_EH - drift_EH.mean(0)), atol=0.01)


def test_predictors_that_say_nothing_are_r2_to_the_bit(tmp_path: Path) -> None:
    common = (*FEW, "routing.attribution=true")
    found = run(tmp_path / "a", *common, "routing.replay=predict", "routing.predictor_lr_factor=1e-30", always=False)
    expected = run(tmp_path / "b", *common, "routing.replay=r2", always=False)
    for one, other in zip(found.metrics, expected.metrics, strict=True):
        own = {name: one.pop(name) for name in list(one) if name.startswith("routing/predictor/")}
        assert own["routing/predictor/kl"] == own["routing/predictor/kl_unchanged"] > 0
        assert own["routing/predictor/changed"] == 0
        assert {k: v for k, v in one.items() if "/replay/" in k} == {k: v for k, v in other.items() if "/replay/" in k}
    compare(found, expected)


def test_predictions_far_off_are_no_fault_and_rows_of_other_tokens_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, *FEW) as trainer:
        rl_step(trainer)
        assert trainer.optimizer.predictor is not None
        assert trainer.optimizer.predictor.steps == 3, "the first mini-batch teaches nothing"
        drawn(trainer.optimizer.predictor, 3.0)
        metrics = rl_step(trainer).metrics
        assert metrics["routing/replay/aligned"] == metrics["routing/replay/coverage"] == 1
        assert metrics["routing/predictor/changed"] > 0.2
        assert metrics["routing/replay/forced"] > 0.2
        assert metrics["ratio/token_mean"] == pytest.approx(1, abs=0.5)
        whole = learn.with_old_policy

        def shifted(of: Any, given: Sequence[TrainingPack]) -> list[TrainingPack]:
            found = whole(of, given)
            return [replace(one, replay_TLK=one.replay_TLK.roll(1, 0)) for one in found if one.replay_TLK is not None]

        monkeypatch.setattr(learn, "with_old_policy", shifted)
        with pytest.raises(TrainingError, match=r"routing\.replay=predict: replayed routes are shifted by one token"):
            rl_step(trainer)


def test_an_update_that_is_skipped_teaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, *FEW, "optimizer.max_skipped_updates=9") as trainer:
        predictor = trainer.optimizer.predictor
        assert predictor is not None
        monkeypatch.setattr(trainer.optimizer.megatron, "get_grad_norm", lambda: math.inf)
        metrics = rl_step(trainer).metrics
        assert metrics["optimizer/skipped_updates"] == 4
        assert "routing/predictor/kl" not in metrics
        assert predictor.steps == 0
        assert not any(weight.any() for weight in predictor.weights)


def test_a_checkpoint_holds_the_predictors_and_their_moments(tmp_path: Path) -> None:
    done = Progress(step=1, policy_version=2)

    def teach(model: Model, predictor: Predictor) -> Predictor:
        found, _ = foretell(model, predictor)
        drifted(model)
        predictor.learn(lesson(model, predictor, found)[0], 1e-4)
        return predictor

    with trained(CONFIG, layout()) as (model, optimizer):
        assert optimizer.predictor is not None
        teach(model, teach(model, optimizer.predictor))
        path = save_checkpoint(tmp_path, model, optimizer, done, keep=1)
        expected = [one.clone() for one in teach(model, optimizer.predictor).weights]
    with trained(CONFIG, layout()) as (model, optimizer):
        assert optimizer.predictor is not None
        assert load_checkpoint(path, model, optimizer) == done
        assert optimizer.predictor.steps == 2
        assert optimizer.is_finite()
        assert all(map(torch.equal, teach(model, optimizer.predictor).weights, expected))
        next(iter(optimizer.predictor.weights))[0, 0] = math.nan
        assert not optimizer.is_finite()
        assert len(optimizer.predictor.shards(weight_shards(model))) == SIZES.num_hidden_layers


def test_the_batch_of_a_step_may_have_no_sampled_token_with_a_route(tmp_path: Path) -> None:
    with opened(tmp_path, *FEW) as trainer:
        assert trainer.optimizer.predictor is not None
        rl_step(trainer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rl, "learn", lambda of, batch: learn.learn(of, cut(batch, lambda index: 1)))
            metrics = rl_step(trainer).metrics
        assert not any(name.startswith("routing/predictor/") for name in metrics)
        assert all(one.isfinite().all() for one in trainer.optimizer.predictor.weights)
