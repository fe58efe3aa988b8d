"""rspo's router shift: against transformers' router in float64, at equal weights, and with a forward of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.weights import SafetensorsSource, load_weights
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.training import shift
from tests.policy import SIZES, packs_of, score_and_record, trained
from tests.qwen3 import layout, reference_model
from tests.steps import Result as MinibatchResult
from tests.steps import train_minibatch
from tests.unit.training.test_step import LENGTHS, TEMPERATURE, like_gradient_descent, samples

BOUND = 0.4  # of the log-ratio, on either side


def save(folder: Path, noise: float) -> Any:
    """transformers' model in float64, all weights moved by `noise` and rounded to what a checkpoint in fp32 holds."""
    model = reference_model(SIZES)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")  # grouped products have no float64
    return double


def run(model: Any, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs of tokens 1.. and each layer's router probabilities [tokens, experts] for tokens ..-1."""
    ids = torch.tensor(token_ids)
    found = model(input_ids=ids[None], output_router_logits=True)
    log_probs = torch.log_softmax(found.logits[0, :-1] / TEMPERATURE, dim=1).gather(1, ids[1:, None])[:, 0]
    return log_probs, [torch.softmax(logits.detach()[:-1], dim=1) for logits in found.router_logits]


def shift_of(old: Sequence[torch.Tensor], new: Sequence[torch.Tensor], token: int) -> float:
    """gamma of SPEC section 4, one expert at a time."""
    product = 1.0
    for old_TE, new_TE in zip(old, new, strict=True):
        experts = old_TE[token].topk(SIZES.num_experts_per_tok).indices.tolist()
        for e in experts:
            kept = min(old_TE[token, e] / new_TE[token, e], new_TE[token, e] / old_TE[token, e])
            product *= float(kept) ** (1 / len(experts))
    return product ** (1 / len(old))


def train(
    model: Model, optimizer: Any, old: Sequence[torch.Tensor], recorder: RouteRecorder, routes: Sequence[Any]
) -> MinibatchResult:
    return train_minibatch(
        model,
        optimizer,
        packs_of(samples(), per_pack=3),
        old,
        Config.model_validate({"algorithm": {"name": "rspo"}}).algorithm,
        num_sequences=len(LENGTHS),
        temperature=TEMPERATURE,
        recorder=recorder,
        old_routes=routes,
    )


def test_loss_and_gradient_are_those_of_the_formula_on_transformers(tmp_path: Path) -> None:
    old, new = save(tmp_path / "old", 0.0), save(tmp_path / "new", 0.02)
    packs = packs_of(samples(), per_pack=3)
    source = SafetensorsSource(tmp_path / "old")
    with trained(like_gradient_descent(clip_grad=0.0), layout(), SIZES, source) as (model, optimizer):
        recorder = RouteRecorder(model.chunks, SIZES, model.groups, scores=True)
        scored, routes = score_and_record(model, packs, recorder, temperature=TEMPERATURE)
        load_weights(model, SafetensorsSource(tmp_path / "new"))
        result = train(model, optimizer, scored, recorder, routes)
    loss, shifts = torch.zeros((), dtype=torch.float64), []
    for sample in samples():
        (old_log_probs, old_router), (log_probs, router) = run(old, sample.token_ids), run(new, sample.token_ids)
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for token, is_response in enumerate(sample.response_mask[1:]):
            if is_response:
                shifts.append(shift_of(old_router, router, token))
                log_ratio = log_probs[token] - old_log_probs[token].detach() + math.log(max(shifts[-1], 0.8))
                bounded = log_ratio.clamp(max=BOUND) if sample.advantage > 0 else log_ratio.clamp(min=-BOUND)
                total, tokens = total + bounded, tokens + 1
        loss = loss - sample.advantage * (total / tokens).exp() / len(LENGTHS)
    loss.backward()
    metrics = result.statistics.to_metrics()
    floored = sum(value < 0.8 for value in shifts)
    assert 0 < floored < len(shifts), "the floor holds some tokens up and not others"
    assert metrics["router_shift/mean"] == pytest.approx(sum(shifts) / len(shifts), rel=1e-5)
    assert metrics["router_shift/floored"] == pytest.approx(floored / len(shifts))
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=5e-6)
    norms = torch.stack([p.grad.norm() for p in new.parameters() if p.grad is not None])
    assert result.update.grad_norm == pytest.approx(norms.norm().item(), rel=1e-4)


def test_at_equal_weights_the_shift_is_exactly_one() -> None:
    packs = packs_of(samples(), per_pack=3)
    with trained(Config(), layout()) as (model, optimizer):
        recorder = RouteRecorder(model.chunks, SIZES, model.groups, scores=True)
        scored, routes = score_and_record(model, packs, recorder, temperature=TEMPERATURE)
        first, second = (train(model, optimizer, scored, recorder, routes).statistics.to_metrics() for _ in range(2))
    assert first["router_shift/mean"] == 1
    assert first["router_shift/floored"] == first["ratio/token_std"] == 0
    assert second["router_shift/mean"] < 1


def test_a_forward_of_its_own_finds_what_the_training_forward_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines need it; tests/distributed/test_policy_layouts.py runs them."""
    packs, found = packs_of(samples(), per_pack=3), []
    for stages in (1, 2):
        with trained(Config(), layout()) as (model, optimizer):
            recorder = RouteRecorder(model.chunks, SIZES, model.groups, scores=True)
            scored, routes = score_and_record(model, packs, recorder, temperature=TEMPERATURE)
            train(model, optimizer, scored, recorder, routes)
            if stages == 2:
                monkeypatch.setattr(shift, "is_one_stage", lambda _: False)
            found.append(train(model, optimizer, scored, recorder, routes))
    assert found[0].statistics.to_metrics() == found[1].statistics.to_metrics()
    assert found[0].update == found[1].update
