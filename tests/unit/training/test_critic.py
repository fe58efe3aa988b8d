"""PPO in one process: against transformers in float64, under every split into packs, and only where asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.convert import Conversion, megatron_to_hf
from gspo_moe.model.hf import export_hf
from gspo_moe.model.names import VALUE_HEAD, hf_shapes
from gspo_moe.model.sharded import load_stored_weights
from gspo_moe.model.weights import RandomSource, SafetensorsSource, TensorSource, draw_value_head, load_weights
from gspo_moe.parallel.groups import shut_down
from gspo_moe.scoring.score import score, score_with_values
from gspo_moe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gspo_moe.training.critic import Estimates, estimate, value_fault
from gspo_moe.types import Microbatch
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import layout, reference_model, tensors_in
from tests.steps import Result as MinibatchResult
from tests.steps import train_minibatch, with_segments
from tests.unit.training.test_checkpoint import KINDS
from tests.unit.training.test_step import LENGTHS, TEMPERATURE, samples

TOKENS = sum(sum(sample.response_mask) for sample in samples())
GAMMA, LAM, COEFF, CLIP, VALUE_CLIP = 0.98, 0.9, 0.7, 0.2, 0.3


def options() -> Any:
    return configured().algorithm.settings


def configured(kind: dict[str, Any] | None = None, **optimizer: Any) -> Config:
    """Adam's first step with a large eps is smooth in the gradient."""
    ppo = {"gamma": GAMMA, "lam": LAM, "value_coeff": COEFF, "value_clip": VALUE_CLIP}
    return Config.model_validate(
        {
            "algorithm": {"name": "ppo", "options": ppo},
            "optimizer": {"lr": 1.0, "eps": 1.0, **optimizer},
            **(kind or {}),
        }
    )


def noise(index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the old policy's log-probs and values of a sample lie from the new one's."""
    generator = torch.Generator().manual_seed(40 + index)
    return 0.25 * torch.randn(count, generator=generator), 0.4 * torch.randn(count, generator=generator)


def old_policy(model: Model, packs: Sequence[Microbatch]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs and values of an old policy some way off, for each pack."""
    log_probs, values = [], []
    for pack, (log_probs_T, values_T) in zip(
        packs, score_with_values(model, packs, temperature=TEMPERATURE), strict=True
    ):
        lengths = pack.cu_seqlens.diff().tolist()
        off = [noise(index, length) for index, length in zip(pack.sample_indices, lengths, strict=True)]
        log_probs.append(log_probs_T + torch.cat([one for one, _ in off]))
        values.append(values_T + torch.cat([one for _, one in off]))
    return log_probs, values


def step(model: Model, optimizer: Any, config: Config, packs: Sequence[Microbatch]) -> MinibatchResult:
    log_probs, values = old_policy(model, packs)
    estimates = estimate(with_segments(packs), values, config.algorithm.settings, model.groups)
    more: dict[str, Any] = {"num_tokens": TOKENS, "estimates": estimates}
    return train_minibatch(
        model, optimizer, packs, log_probs, config.algorithm, len(LENGTHS), TEMPERATURE, None, **more
    )


class Reference:
    """transformers' model in float64 with a value head, PPO written out one token at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = reference_model(SIZES)
        self.model.save_pretrained(folder)
        self.model.double().set_experts_implementation("eager")  # grouped products have no float64

    def loss(self, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """What is differentiated, and the figures; weight: the value head's, float64 [1, H]."""
        terms = []  # by response token: log-prob, value, old ones
        advantages: list[float] = []
        returns: list[float] = []
        for index, sample in enumerate(samples()):
            ids = torch.tensor(sample.token_ids)
            found = self.model(input_ids=ids[None], output_hidden_states=True)
            log_probs = torch.log_softmax(found.logits[0, :-1] / TEMPERATURE, dim=1).gather(1, ids[1:, None])[:, 0]
            values = found.hidden_states[-1][0, :-1] @ weight[0]
            off_log_probs, off_values = noise(index, len(ids) - 1)
            tokens = [t for t, on in enumerate(sample.response_mask[1:]) if on]
            old = [values[t].item() + off_values[t].item() for t in tokens]
            following, ahead = 0.0, 0.0
            for k in reversed(range(len(tokens))):
                reward = sample.reward if k == len(tokens) - 1 else 0.0
                ahead = reward + GAMMA * following - old[k] + GAMMA * LAM * ahead
                following = old[k]
                t = tokens[k]
                terms.append((log_probs[t], log_probs[t].item() + off_log_probs[t].item(), values[t], old[k]))
                advantages.append(ahead)
                returns.append(ahead + old[k])
        mean, deviation = statistics.fmean(advantages), statistics.stdev(advantages)
        policy, value = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for (log_prob, old_log_prob, new, old_value), advantage, target in zip(terms, advantages, returns, strict=True):
            white = (advantage - mean) / (deviation + 1e-8)
            ratio = (log_prob - old_log_prob).exp()
            policy = policy - torch.minimum(ratio * white, ratio.clamp(1 - CLIP, 1 + CLIP) * white)
            bounded = new.clamp(old_value - VALUE_CLIP, old_value + VALUE_CLIP)
            value = value + 0.5 * torch.maximum((new - target) ** 2, (bounded - target) ** 2)
        errors = statistics.pvariance([r - old for r, (*_, old) in zip(returns, terms, strict=True)])
        figures = {
            "loss/policy": policy.item() / TOKENS,
            "value/loss": value.item() / TOKENS,
            "value/explained_variance": 1 - errors / statistics.pvariance(returns),
        }
        return (policy + COEFF * value) / TOKENS, figures


@pytest.mark.parametrize("fused", [True, False])
def test_losses_and_gradients_are_those_of_the_formula_on_transformers(fused: bool, tmp_path: Path) -> None:
    kind = {"model": {"preset": "tiny", "fused_log_probs": fused}}
    reference, config = Reference(tmp_path), configured(kind, clip_grad=0.0)
    source: TensorSource = SafetensorsSource(tmp_path)
    with trained(config, layout(), SIZES, source) as (model, optimizer):
        head = dict(model.gpt_chunks[0].named_parameters())[VALUE_HEAD]
        weight = head.detach().double().clone().requires_grad_()
        result = step(model, optimizer, config, packs_of(samples(), per_pack=3))
        loss, figures = reference.loss(weight)
        loss.backward()
        ours, theirs = dict(model.gpt_chunks[0].named_parameters()), dict(reference.model.named_parameters())
        pairs = {
            VALUE_HEAD: weight.grad,
            "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"].grad,
            "output_layer.weight": theirs["lm_head.weight"].grad,
            "decoder.final_layernorm.weight": theirs["model.norm.weight"].grad,
            "decoder.layers.0.mlp.router.weight": theirs["model.layers.0.mlp.gate.weight"].grad,
        }
        for name, expected in pairs.items():
            assert expected is not None
            error = (ours[name].main_grad.double() - expected).norm()
            assert error <= 1e-4 * expected.norm(), name
            assert expected.norm() > 0, name
    metrics = result.statistics.to_metrics()
    assert 0 < metrics["value/clip_fraction"] < 1
    assert 0 < metrics["clip_fraction/token"] < 1
    assert {name: metrics[name] for name in figures} == pytest.approx(figures, rel=1e-5, abs=2e-6)
    norms = [p.grad.norm().item() for p in [*theirs.values(), weight] if p.grad is not None]
    assert result.update.grad_norm == pytest.approx(math.hypot(*norms), rel=1e-4)


def test_figures_gradient_and_update_do_not_depend_on_the_split_into_packs() -> None:
    outcomes = []
    for per_pack in (len(LENGTHS), 3, 1):
        config = configured()
        with trained(config, layout()) as (model, optimizer):
            before = {name: value.detach().clone() for name, value in model.chunks[0].named_parameters()}
            result = step(model, optimizer, config, packs_of(samples(), per_pack))
            change = torch.cat([(p - before[n]).detach().flatten() for n, p in model.chunks[0].named_parameters()])
        outcomes.append((result.statistics.to_metrics(), result.update.grad_norm, change))
    metrics, grad_norm, change = outcomes[0]
    for other_metrics, other_norm, other_change in outcomes[1:]:
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert other_norm == pytest.approx(grad_norm, rel=1e-5)
        assert (other_change - change).norm() <= 1e-5 * change.norm()


def test_values_come_with_the_same_log_probs() -> None:
    with trained(configured(), layout()) as (model, _):
        packs = packs_of(samples(), per_pack=3)
        plain, both = score(model, packs), score_with_values(model, packs)
        assert all(torch.equal(one, other) for one, (other, _) in zip(plain, both, strict=True))
        assert all(values_T.shape == pack.target_ids_T.shape for pack, (_, values_T) in zip(packs, both, strict=True))
        assert estimate(with_segments(packs), [], options(), model.groups) == []


def test_other_algorithms_have_no_value_head() -> None:
    assert not Config().has_value_head
    assert not Config.model_validate({"stage": "sft", "algorithm": {"name": "ppo"}}).has_value_head
    with trained(Config(), layout()) as (model, _):
        assert VALUE_HEAD not in dict(model.gpt_chunks[0].named_parameters())


def test_advantages_are_whitened_over_the_step() -> None:
    with trained(configured(), layout()) as (model, _):
        packs = packs_of(samples(), per_pack=3)
        found: list[Estimates] = estimate(with_segments(packs), old_policy(model, packs)[1], options(), model.groups)
    kept = torch.cat([e.advantages_T[p.response_mask_T != 0] for e, p in zip(found, packs, strict=True)])
    assert kept.mean().item() == pytest.approx(0, abs=1e-12)
    assert kept.std().item() == pytest.approx(1, rel=1e-6)


def test_values_that_are_not_finite_are_told_before_they_train() -> None:
    with trained(configured(), layout()) as (model, _):
        packs = packs_of(samples(), per_pack=3)
        _, values = old_policy(model, packs)
        assert value_fault([]) is None
        assert value_fault(estimate(with_segments(packs), values, options(), model.groups)) is None
        values[-1][packs[-1].response_mask_T.nonzero()[-1]] = math.inf
        fault = value_fault(estimate(with_segments(packs), values, options(), model.groups))
    assert "the value head's values" in str(fault)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind: dict[str, Any], tmp_path: Path) -> None:
    config, packs = configured(kind), packs_of(samples(), per_pack=3)
    with trained(config, layout()) as (model, optimizer):
        step(model, optimizer, config, packs)
        path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 96, 1), keep=1)
        expected = [step(model, optimizer, config, packs) for _ in range(2)]
        end = [parameter.detach().clone() for parameter in model.chunks[0].parameters()]
    with trained(config, layout(), source=RandomSource(SIZES, seed=5)) as (model, optimizer):
        draw_value_head(model, seed=5)
        load_checkpoint(path, model, optimizer)
        for one in expected:
            found = step(model, optimizer, config, packs)
            assert found.update == one.update
            assert found.statistics.to_metrics() == one.statistics.to_metrics()
        assert all(torch.equal(*pair) for pair in zip(end, model.chunks[0].parameters(), strict=True))


def test_exports_and_other_algorithms_leave_the_value_head_out(tmp_path: Path) -> None:
    with trained(configured(), layout()) as (model, optimizer):
        path = save_checkpoint(tmp_path / "run", model, optimizer, Progress(), keep=1)
        export_hf(model, tmp_path / "hf")
        ours = dict(model.gpt_chunks[0].named_parameters())
    assert tensors_in(tmp_path / "hf").keys() == hf_shapes(SIZES).keys()
    with trained(Config(), layout(), source=RandomSource(SIZES, seed=5)) as (model, optimizer):
        for load in (lambda: load_stored_weights(model, path), lambda: load_checkpoint(path, model, optimizer)):
            load_weights(model, RandomSource(SIZES, seed=5))
            load()
            for name, value in model.gpt_chunks[0].named_parameters():
                assert torch.equal(value, ours[name]), name
    try:
        assert megatron_to_hf(Conversion(path, tmp_path / "again", SIZES, show_progress=False)) == len(hf_shapes(SIZES))
    finally:
        shut_down()
    assert tensors_in(tmp_path / "again").keys() == hf_shapes(SIZES).keys()


def test_another_algorithms_weights_leave_the_value_head_as_it_was_drawn(tmp_path: Path) -> None:
    with trained(Config(), layout()) as (model, optimizer):
        path = save_checkpoint(tmp_path, model, optimizer, Progress(), keep=1)
    with trained(configured(), layout()) as (model, _):
        head = dict(model.gpt_chunks[0].named_parameters())[VALUE_HEAD]
        before = head.detach().clone()
        load_stored_weights(model, path)
        assert torch.equal(head, before)
        assert before.std().item() == pytest.approx(SIZES.initializer_range, rel=0.5)
