"""One optimizer step in one process: against transformers and float64 formulas, and under every split into packs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.weights import SafetensorsSource
from gspo_moe.routing.comparison import compare
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.types import Microbatch, TrainingSample
from tests.losses import WHOLE_SEQUENCES
from tests.policy import SIZES, packs_of, score_and_record, trained
from tests.qwen3 import layout, random_sequences, reference_model
from tests.steps import Result as MinibatchResult
from tests.steps import train_minibatch, train_supervised

LENGTHS = (9, 14, 5, 11, 21, 3, 8, 12)
TEMPERATURE = 0.8
# How far the old policy lies from the new one, so that some tokens or sequences are clipped and some are not.
NOISE = {"gspo": 2e-3, "gspo_token": 2e-3, "grpo": 0.25, "dr_grpo": 0.25, "dapo": 0.25, "cispo": 1.5, "gmpo": 0.4}
ALGORITHMS = ("gspo", "gspo_token", "grpo")


def samples() -> list[TrainingSample]:
    """Sequences of a prompt, a response, two tool tokens and more response where there is room."""
    found = []
    for number, ids in enumerate(random_sequences(SIZES, LENGTHS, seed=8)):
        prompt = 1 + number % 2
        mask = [0] * prompt + [1] * (len(ids) - prompt)
        if len(ids) > 8:
            mask[5:7] = [0, 0]
        found.append(TrainingSample(tuple(ids.tolist()), tuple(mask), advantage=(-1.0) ** number * (1 + number / 7)))
    return found


def split(values: Sequence[torch.Tensor], packs: Sequence[Microbatch]) -> list[torch.Tensor]:
    """Values a sample, put end to end as the packs are."""
    return [torch.cat([values[index] for index in pack.sample_indices]) for pack in packs]


def by_sample(values: Sequence[torch.Tensor], packs: Sequence[Microbatch]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for pack, values_T in zip(packs, values, strict=True):
        found |= zip(pack.sample_indices, values_T.split(pack.cu_seqlens.diff().tolist()), strict=True)
    return [found[index] for index in sorted(found)]


def old_policy(model: Model, algorithm: str) -> list[torch.Tensor]:
    """Log-probs a sample of an old policy some way off."""
    packs = packs_of(samples(), per_pack=3)
    generator = torch.Generator().manual_seed(9)
    return [
        log_probs + NOISE[algorithm] * torch.randn(log_probs.shape, generator=generator)
        for log_probs in by_sample(score(model, packs, temperature=TEMPERATURE), packs)
    ]


def step(
    model: Model, optimizer: Any, packs: Sequence[Microbatch], old: list[torch.Tensor], algorithm: str, **more: Any
) -> MinibatchResult:
    return train_minibatch(
        model,
        optimizer,
        packs,
        split(old, packs),
        more.get("config") or AlgorithmConfig(name=algorithm),
        num_sequences=len(LENGTHS),
        temperature=TEMPERATURE,
        recorder=more.get("recorder"),
        num_tokens=sum(sum(sample.response_mask) for sample in samples()),
        max_response_tokens=max(LENGTHS),
        reference_log_probs=split(more["reference"], packs) if "reference" in more else (),
    )


def like_gradient_descent(**optimizer: Any) -> Config:
    """Adam's first step with a large eps is smooth in the gradient; with a small one it is the gradient's sign."""
    return Config.model_validate({"optimizer": {"lr": 1.0, "eps": 1.0, "clip_grad": 1.0, **optimizer}})


def with_everything(algorithm: str) -> AlgorithmConfig:
    """With a KL penalty and a mismatch correction that leaves out some of the tokens or sequences."""
    correction: dict[str, Any] = {"correction": "mask", "level": "sequence", "low": 0.5, "high": 1.2}
    if algorithm not in WHOLE_SEQUENCES:
        correction["level"] = "token"
    return AlgorithmConfig.model_validate({"name": algorithm, "mismatch": correction, "kl": {"coeff": 0.04}})


@pytest.mark.parametrize("algorithm", NOISE)
def test_statistics_gradient_and_update_do_not_depend_on_the_split_into_packs(algorithm: str) -> None:
    outcomes = []
    for per_pack in (len(LENGTHS), 3, 1):
        with trained(like_gradient_descent(), layout()) as (model, optimizer):
            old = old_policy(model, algorithm)
            before = {name: value.clone() for name, value in model.chunks[0].named_parameters()}
            packs = packs_of(samples(), per_pack)
            engine = split([log_probs + 0.4 * (-1) ** (i // 2) for i, log_probs in enumerate(old)], packs)
            packs = [replace(pack, rollout_log_probs_T=engine_T) for pack, engine_T in zip(packs, engine, strict=True)]
            more = {"config": with_everything(algorithm), "reference": [log_probs + 0.1 for log_probs in old]}
            result = step(model, optimizer, packs, old, algorithm, **more)
            change = torch.cat([(p - before[n]).detach().flatten() for n, p in model.chunks[0].named_parameters()])
        outcomes.append((result.statistics.to_metrics(), result.update, change))
    metrics, update, change = outcomes[0]
    assert 0 < metrics["clip_fraction/sequence"] <= 1
    assert 0 < metrics["clip_fraction/token"] < 1
    assert update.grad_norm > 0.01
    for other_metrics, other_update, other_change in outcomes[1:]:
        assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-6)
        assert other_update.grad_norm == pytest.approx(update.grad_norm, rel=1e-5)
        assert (other_change - change).norm() <= 1e-5 * change.norm()


def expected_loss(algorithm: str, log_ratios: Sequence[torch.Tensor], advantages: Sequence[float]) -> torch.Tensor:
    """SPEC section 1, one sequence at a time; log_ratios: d on the response tokens of each."""
    low, high = AlgorithmConfig(name=algorithm).clips
    total = torch.zeros((), dtype=torch.float64)
    for d, advantage in zip(log_ratios, advantages, strict=True):
        if algorithm == "gspo":
            ratio = d.mean().exp()
        elif algorithm == "gspo_token":
            ratio = d.mean().exp().detach() * (d - d.detach()).exp()
        else:
            ratio = d.exp()
        total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).mean()
    return total / len(advantages)


class Reference:
    """transformers' model in float64 and its gradients."""

    def __init__(self, folder: Path) -> None:
        self.model = reference_model(SIZES)
        self.model.save_pretrained(folder)
        self.model.double().set_experts_implementation("eager")  # grouped products have no float64

    def log_probs(self, sample: TrainingSample, temperature: float = 1.0) -> torch.Tensor:
        ids = torch.tensor(sample.token_ids)
        logits = self.model(input_ids=ids[None]).logits[0, :-1] / temperature
        return torch.log_softmax(logits, dim=1).gather(1, ids[1:, None])[:, 0]

    def check(self, model: Model, grad_norm: float) -> None:
        """Each kind of parameter, in a layer each, and the norm of them all."""
        ours = dict(model.gpt_chunks[0].named_parameters())
        theirs = dict(self.model.named_parameters())
        experts = (
            theirs["model.layers.0.mlp.experts.gate_up_proj"].grad,
            theirs["model.layers.1.mlp.experts.down_proj"].grad,
        )
        pairs = {
            "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"].grad,
            "output_layer.weight": theirs["lm_head.weight"].grad,
            "decoder.final_layernorm.weight": theirs["model.norm.weight"].grad,
            "decoder.layers.0.mlp.router.weight": theirs["model.layers.0.mlp.gate.weight"].grad,
            "decoder.layers.1.self_attention.linear_proj.weight": theirs["model.layers.1.self_attn.o_proj.weight"].grad,
            "decoder.layers.1.self_attention.q_layernorm.weight": theirs["model.layers.1.self_attn.q_norm.weight"].grad,
            "decoder.layers.0.mlp.experts.linear_fc1.weight": experts[0],
            "decoder.layers.1.mlp.experts.linear_fc2.weight": experts[1],
        }
        for name, expected in pairs.items():
            error = (ours[name].main_grad.double() - expected).norm()
            assert error <= 1e-4 * expected.norm(), name
            assert expected.norm() > 0, name
        norms = torch.stack([p.grad.norm() for p in theirs.values() if p.grad is not None])
        assert grad_norm == pytest.approx(norms.norm().item(), rel=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policy_loss_and_gradients_are_those_of_the_formula_on_transformers(algorithm: str, tmp_path: Path) -> None:
    reference = Reference(tmp_path)
    packs = packs_of(samples(), per_pack=3)
    with trained(like_gradient_descent(clip_grad=0.0), layout(), SIZES, SafetensorsSource(tmp_path)) as (
        model,
        optimizer,
    ):
        old = old_policy(model, algorithm)
        result = step(model, optimizer, packs, old, algorithm)
        responses = [torch.tensor(sample.response_mask[1:], dtype=torch.bool) for sample in samples()]
        log_ratios = [
            (reference.log_probs(sample, TEMPERATURE) - old_T)[response_T]
            for sample, old_T, response_T in zip(samples(), old, responses, strict=True)
        ]
        loss = expected_loss(algorithm, log_ratios, [sample.advantage for sample in samples()])
        loss.backward()
        reference.check(model, result.update.grad_norm)
    assert result.statistics.to_metrics()["loss/policy"] == pytest.approx(loss.item(), abs=2e-6)


def test_supervised_loss_and_gradients_are_torchs_cross_entropy_on_transformers(tmp_path: Path) -> None:
    reference = Reference(tmp_path)
    packs = packs_of(samples(), per_pack=3)
    num_tokens = sum(sum(sample.response_mask) for sample in samples())
    with trained(like_gradient_descent(clip_grad=0.0), layout(), SIZES, SafetensorsSource(tmp_path)) as (
        model,
        optimizer,
    ):
        statistics, update = train_supervised(model, optimizer, packs, num_tokens)
        loss = torch.zeros((), dtype=torch.float64)
        correct = 0
        for sample in samples():
            ids = torch.tensor(sample.token_ids)
            logits = reference.model(input_ids=ids[None]).logits[0, :-1]
            targets = torch.where(torch.tensor(sample.response_mask[1:]) == 1, ids[1:], -100)
            loss = loss + torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_tokens
            correct += int((logits.argmax(dim=1) == targets).sum())
        loss.backward()
        reference.check(model, update.grad_norm)
    metrics = statistics.to_metrics()
    assert metrics["sft/loss"] == pytest.approx(loss.item(), abs=2e-6)
    assert metrics["sft/token_accuracy"] == pytest.approx(correct / num_tokens)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_mini_batch_sees_its_own_weights_exactly(algorithm: str) -> None:
    with trained(Config(), layout()) as (model, optimizer):
        recorder = RouteRecorder(model.chunks, SIZES, model.groups)
        packs = packs_of(samples(), per_pack=3)
        old, old_routes = score_and_record(model, packs, recorder, temperature=TEMPERATURE, responses_only=True)
        first = step(model, optimizer, packs, by_sample(old, packs), algorithm, recorder=recorder)
        second = step(model, optimizer, packs, by_sample(old, packs), algorithm, recorder=recorder)
        compared = [compare(*each, recorder.layers) for each in zip(packs, old_routes, first.routes, strict=True)]
    metrics = first.statistics.to_metrics()
    for kind in ("token", "sequence"):
        assert metrics[f"ratio/{kind}_min"] == metrics[f"ratio/{kind}_max"] == 1
        assert metrics[f"ratio/{kind}_std"] == metrics[f"clip_fraction/{kind}"] == 0
        assert second.statistics.to_metrics()[f"ratio/{kind}_std"] > 0
    assert metrics["kl/old_k3"] == 0
    assert all(torch.equal(log_probs, old_T) for log_probs, old_T in zip(first.log_probs, old, strict=True))
    assert all(sums.to_metrics()["any_layer_flip"] == 0 for sums in compared)
    assert metrics["loss/policy"] == pytest.approx(-sum(sample.advantage for sample in samples()) / len(LENGTHS))


def test_a_gradient_that_is_not_finite_leaves_the_weights(tmp_path: Path) -> None:
    with trained(Config(), layout()) as (model, optimizer):
        packs = packs_of(samples(), per_pack=3)
        old = old_policy(model, "gspo")
        old[0] = old[0] + float("nan")
        before = [parameter.clone() for parameter in model.chunks[0].parameters()]
        result = step(model, optimizer, packs, old, "gspo")
        assert result.update.skipped
        assert all(torch.equal(a, b) for a, b in zip(before, model.chunks[0].parameters(), strict=True))
        result = step(model, optimizer, packs, old_policy(model, "gspo"), "gspo")
        assert not result.update.skipped
        assert all(bool(parameter.isfinite().all()) for parameter in model.chunks[0].parameters())


@pytest.mark.parametrize("ratio", [2000.0, float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_leaves_the_weights_too(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where clipping has taken its gradient away."""
    with trained(Config(), layout()) as (model, optimizer):
        packs = packs_of(samples(), per_pack=3)
        old = old_policy(model, "gspo")
        monkeypatch.setattr(type(optimizer.megatron), "get_grad_norm", lambda self: 1.0)
        broken = [old[0] - ratio, *old[1:]]
        before = [parameter.clone() for parameter in model.chunks[0].parameters()]
        assert step(model, optimizer, packs, broken, "gspo").update.skipped
        assert all(torch.equal(a, b) for a, b in zip(before, model.chunks[0].parameters(), strict=True))


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_frozen_router_stays_while_the_rest_learns(distributed_optimizer: bool) -> None:
    settings = {"routing": {"frozen_router": True, "aux_loss_coeff": 0.1}}
    config = Config.model_validate({**settings, "parallel": {"distributed_optimizer": distributed_optimizer}})
    with trained(config, layout()) as (model, optimizer):
        before = {name: value.detach().clone() for name, value in model.gpt_chunks[0].named_parameters()}
        step(model, optimizer, packs_of(samples(), per_pack=3), old_policy(model, "grpo"), "grpo")
        moved = {name: not torch.equal(before[name], value) for name, value in model.gpt_chunks[0].named_parameters()}
    routers = {name for name in moved if ".router." in name}
    assert len(routers) == SIZES.num_hidden_layers
    assert {name for name in moved if not moved[name]} == routers
