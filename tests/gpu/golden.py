"""A tiny model, the numbers it must give (golden.json, by `record_golden.py`), and the check that a machine gives them.

The weights are exact in bf16, so that a bf16 run differs from the recorded float64 numbers by its arithmetic alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.hf import whole_tensors
from gspo_moe.model.names import hf_shapes
from gspo_moe.model.weights import load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.parallel.reduce import from_last_stage, gather_over_data
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.routing.comparison import gather_layers
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.packs import microbatches, pack_share
from gspo_moe.types import Microbatch, TrainingSample
from tests.launch import renew_port
from tests.qwen3 import Tensors
from tests.steps import train_minibatch

GOLDEN = Path(__file__).with_name("golden.json")
# Sizes that grouped matrix products and variable-length attention take in 16 bits.
SIZES = Architecture(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    moe_intermediate_size=32,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    rope_theta=10_000.0,
)
PROMPT = 2
LENGTHS = (12, 7, 25, 9, 18, 5)
ADVANTAGES = (1.0, -1.0, 0.7, -1.3, 1.1, -0.4)
# The log-ratio of each sequence: the first two are clipped, and no rounding error in bf16 moves any over a clip.
SHIFTS = (0.6, -0.6, 0.05, 0.6, -0.5, 0.02)
CLIPS = (0.2, 0.27)
PROMPTS = ((3, 77, 9), (120,), (8, 8, 41, 5, 63))
RESPONSE_TOKENS = 12
GRADIENTS = (
    "model.norm.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.1.mlp.experts.3.down_proj.weight",
)


@dataclass(frozen=True)
class Tolerance:
    """How far a run may be from the recorded numbers.

    log_probs, loss: largest absolute difference (nats). gradient: relative, of each tensor's difference in norm.
    routes: smallest share of (token, layer, slot) that agrees. greedy: whether the texts must be equal.
    """

    log_probs: float
    loss: float
    gradient: float
    routes: float
    greedy: bool


# fp32 on a CPU is off by 4e-6; matrix products in TF32 would be off by 1e-3.
FP32 = Tolerance(log_probs=1e-4, loss=1e-5, gradient=1e-4, routes=1.0, greedy=True)
# bf16 on a CPU is off by 0.045, 0.003 and 2 %: it rounds logits, which reach 8 here, to multiples of 1/32.
BF16 = Tolerance(log_probs=0.12, loss=0.01, gradient=0.06, routes=0.98, greedy=False)


@dataclass(frozen=True)
class Observed:
    """What a run of this model gave, complete on the first rank; the fields of golden.json."""

    log_probs: list[torch.Tensor]
    routes: list[torch.Tensor]
    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]
    greedy: list[list[int]]


def weights() -> dict[str, torch.Tensor]:
    """Every HF tensor: multiples of a power of two that bf16 holds exactly, from Python's own generator."""
    random = Random(20250722)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        steps = torch.tensor([int(255 * random.random()) - 127 for _ in range(count)]).reshape(shape)
        if name.endswith("norm.weight"):
            return 1 + steps.div(4, rounding_mode="trunc") / 128
        return steps / (256.0 if name == "lm_head.weight" else 512.0)

    return {name: draw(name, shape) for name, shape in hf_shapes(SIZES).items()}


def samples() -> list[TrainingSample]:
    random = Random(1)
    found = []
    for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        ids = tuple(int(SIZES.vocab_size * random.random()) for _ in range(length))
        found.append(TrainingSample(ids, (0,) * PROMPT + (1,) * (length - PROMPT), advantage))
    return found


def golden() -> Observed:
    values = json.loads(GOLDEN.read_text())
    return Observed(
        log_probs=[torch.tensor(one, dtype=torch.float64) for one in values["log_probs"]],
        routes=[torch.tensor(one) for one in values["routes"]],
        loss=values["loss"],
        grad_norm=values["grad_norm"],
        gradients={name: torch.tensor(one, dtype=torch.float64) for name, one in values["gradients"].items()},
        greedy=values["greedy"],
    )


def old_log_probs(log_probs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probs of each sample under an old policy that lies off by `SHIFTS`."""
    return [one - shift for one, shift in zip(log_probs, SHIFTS, strict=True)]


def settings(dtype: str = "fp32", backend: str = "auto") -> Config:
    low, high = CLIPS
    return Config.model_validate(
        {
            "model": {"preset": "tiny", "dtype": dtype, "backend": backend},
            "algorithm": {"clip_low": low, "clip_high": high, "allow_wide_clip": True, "mini_batches": 1},
            "optimizer": {"clip_grad": 0.0},
            "schedule": {"micro_batch_tokens": 40},
        }
    )


def observe(config: Config, layout: Layout, tensors: dict[str, torch.Tensor] | None = None) -> Observed:
    """Generates, scores and takes one GSPO step with the golden weights (or `tensors`). Collective."""
    groups = initialize(layout, seed=1)
    try:
        model = build_model(config, SIZES, groups)
        load_weights(model, Tensors(weights() if tensors is None else tensors))
        greedy = _greedy(model)
        recorder = RouteRecorder(model.chunks, SIZES, groups)
        optimizer = Optimizer(config, model, total_updates=1)
        packs = microbatches(pack_share(samples(), groups, config))
        record = recorder.start()
        log_probs = score(model, packs, record=record)
        whole = [gather_layers(one.routes_TLK, recorder.layers) for one in record.recordings()]
        routes = [routes_TAK.sort(dim=-1).values for routes_TAK in whole]
        old = old_log_probs(golden().log_probs)
        old = [torch.cat([old[i] for i in pack.sample_indices]).to(pack.advantages_N) for pack in packs]
        result = train_minibatch(model, optimizer, packs, old, config.algorithm, len(LENGTHS), 1.0, recorder)
        gradients = {name: one.double() for name, one in whole_tensors(model, _main_grad) if name in GRADIENTS}
        observed = Observed(
            log_probs=_by_sample(from_last_stage([one.cpu() for one in log_probs], groups), packs, model),
            routes=_by_sample([one.cpu() for one in routes], packs, model),
            loss=result.statistics.to_metrics()["loss/policy"],
            grad_norm=result.update.grad_norm,
            gradients=gradients,
            greedy=greedy,
        )
        renew_port()
    finally:
        shut_down()
    return observed


def _greedy(model: Model) -> list[list[int]]:
    requests = [Request(str(number), ids, samples=1) for number, ids in enumerate(PROMPTS)]
    params = SamplingParams(0.0, 1.0, 0, RESPONSE_TOKENS, stop_ids=frozenset(), seed="")
    answers = MegatronEngine(model, max_batch=2, prefill_tokens=8).generate(requests, params)
    return [list(rollouts[0].response_ids) for rollouts in answers]


def _main_grad(parameter: Any) -> torch.Tensor:
    gradient: torch.Tensor = parameter.main_grad
    return gradient


def _by_sample(values: list[torch.Tensor], packs: list[Microbatch], model: Model) -> list[torch.Tensor]:
    """Values of every data-parallel rank's packs, by sample."""
    found: dict[int, torch.Tensor] = {}
    for pack, one in zip(packs, values, strict=True):
        found |= zip(pack.sample_indices, one.split(pack.cu_seqlens.diff().tolist()), strict=True)
    merged = {index: one for part in gather_over_data(found, model.groups) for index, one in part.items()}
    return [merged[index] for index in sorted(merged)]


def check(found: Observed, expected: Observed, tolerance: Tolerance) -> None:
    """Fails, naming the number, where a run is further from the expected one than `tolerance`."""
    for index, (ours, theirs) in enumerate(zip(found.log_probs, expected.log_probs, strict=True)):
        error = (ours.double() - theirs).abs().max().item()
        assert error <= tolerance.log_probs, f"log-probs of sequence {index} are off by {error:.2g}"
    pairs = zip(found.routes, expected.routes, strict=True)
    shared = torch.cat([(ours[..., :, None] == theirs[..., None, :]).any(-1).flatten() for ours, theirs in pairs])
    agreement = shared.double().mean().item()
    assert agreement >= tolerance.routes, f"only {agreement:.4f} of the routes agree"
    assert abs(found.loss - expected.loss) <= tolerance.loss, f"loss {found.loss}, expected {expected.loss}"
    error = abs(found.grad_norm / expected.grad_norm - 1)
    assert error <= tolerance.gradient, f"gradient norm {found.grad_norm}, expected {expected.grad_norm}"
    assert found.gradients.keys() == expected.gradients.keys()
    for name, theirs in expected.gradients.items():
        error = ((found.gradients[name] - theirs).norm() / theirs.norm()).item()
        assert error <= tolerance.gradient, f"gradient of {name} is off by {error:.2g}"
    assert not tolerance.greedy or found.greedy == expected.greedy, f"{found.greedy} is not {expected.greedy}"
