"""The formulas against what a model, its gradients and its optimizer take on the CPU, and against shards by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config import load_config
from gspo_moe.config.layout import Layout, check_layout
from gspo_moe.model.cache import KVCache
from gspo_moe.model.forward import run
from gspo_moe.model.inputs import ModelInput
from gspo_moe.model.last_stage import LastStage
from gspo_moe.planning.memory import Memory, estimate, shard_parameters
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer
from tests.unit.training.test_rl import opened

# Stated in docs/launching.md: what the backward pass keeps, measured over estimated.
ACTIVATION_FACTOR = 1.1
# Sizes without a common pattern, and wide enough that a token's few indices are no part of it.
SIZES = (
    "model.overrides={num_hidden_layers: 2, hidden_size: 160, num_experts: 24, num_experts_per_tok: 3, "
    "moe_intermediate_size: 56, num_attention_heads: 6, num_key_value_heads: 2, head_dim: 18}"
)


def of_trainer(trainer: Trainer, prompt_tokens: int = 24) -> Memory:
    plan = trainer.session.plan
    return estimate(plan.config, plan.architecture, plan.layout, prompt_tokens)


def optimizer_bytes(trainer: Trainer) -> int:
    parts = [part for part in trainer.optimizer.megatron.chained_optimizers if part.optimizer is not None]
    moments = [
        value
        for part in parts
        for state in part.optimizer.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    ]
    main = [weight for part in parts for group in part.optimizer.param_groups for weight in group["params"]]
    own = {id(weight) for chunk in trainer.session.model.gpt_chunks for weight in chunk.parameters()}
    return sum(value.nbytes for value in moments) + sum(value.nbytes for value in main if id(value) not in own)


class Saved:
    """Bytes of distinct memory that a pass keeps for its backward pass, weights left out."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for chunk in chunks for weight in chunk.parameters()}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._kept[storage.data_ptr()] = storage  # held, so that no other one gets its place
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


def kept_bytes(trainer: Trainer, tokens: int) -> int:
    """What one micro-batch of two sequences, nearly of one length, keeps up to the last stage's hidden states."""
    model, saved = trainer.session.model, Saved(trainer.session.model.gpt_chunks)
    ids = torch.arange(tokens) % trainer.session.plan.tokenizer.vocab_size
    item = ModelInput(ids, torch.arange(tokens), torch.tensor([0, tokens // 2 - 1, tokens]))

    def head(_: int, stage: LastStage) -> tuple[torch.Tensor, None]:
        return stage.hidden_PH.sum(), None

    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run(model, [item], head, backward=True)
    return saved.bytes


@pytest.mark.parametrize(("dtype", "numerics"), [("fp32", "trainer"), ("bf16", "trainer"), ("fp32", "fp8_rounded")])
def test_what_training_holds_is_what_was_estimated(
    dtype: str, numerics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    select = KVCache.select

    def watched(cache: KVCache, rows: torch.Tensor) -> None:
        before = cache_bytes(cache)
        select(cache, rows)
        held.append(before + cache_bytes(cache))

    monkeypatch.setattr(KVCache, "select", watched)
    overrides = (SIZES, "algorithm.mini_batches=1", f"model.dtype={dtype}", f"rollout.numerics={numerics}")
    with opened(tmp_path, *overrides, "routing.record=false") as trainer:
        model, config = trainer.session.model, trainer.session.config
        result = rl_step(trainer)
        prompts = [len(trainer.session.plan.renderer.prompt(group.prompt)) for group in result.batch.groups]
        found = of_trainer(trainer, max(prompts))
        weights = [weight for chunk in model.gpt_chunks for weight in chunk.parameters()]
        assert sum(weight.numel() for weight in weights) == found.parameters
        assert sum(weight.nbytes for weight in weights) == found.weights
        assert sum(weight.main_grad.nbytes for weight in weights) == found.gradients
        assert optimizer_bytes(trainer) == found.optimizer
        assert held == [found.kv_cache]
        engine = trainer.session.answerer.engine
        assert isinstance(engine, MegatronEngine)
        copied = [] if engine._rounded is None else [*engine._rounded.model.chunks[0].parameters()]
        assert sum(weight.nbytes for weight in copied) == found.rollout_copy
        tokens = 256
        ratio = kept_bytes(trainer, tokens) / (found.activations * tokens / config.schedule.micro_batch_tokens)
        assert 1 / ACTIVATION_FACTOR < ratio < ACTIVATION_FACTOR


def cache_bytes(cache: KVCache) -> int:
    return sum(buffer.nbytes for pair in cache._layers.values() for buffer in pair)


LAYOUT = "parallel={tensor: 4, pipeline: 2, expert: 8, expert_tensor: 2, distributed_optimizer: true}"


def planned(*overrides: str, world_size: int = 32) -> tuple[Memory, Layout, Any]:
    config = load_config(None, ["model=qwen3_30b_a3b", "model.dtype=bf16", *overrides])
    architecture = config.model.architecture()
    layout = check_layout(config, architecture, world_size, "0.19.0")
    return estimate(config, architecture, layout, 100), layout, architecture


def test_the_shards_of_all_ranks_are_the_model() -> None:
    for overrides in ((), (LAYOUT,), ("parallel={pipeline: 4, expert: 8}",)):
        _, layout, architecture = planned(*overrides)
        stages = [shard_parameters(architecture, layout, stage) for stage in range(layout.pipeline)]
        experts = sum(expert for _, expert in stages) * layout.expert * layout.expert_tensor
        assert experts == 48 * 128 * 3 * 2048 * 768
        if layout.tensor == 1:
            assert sum(dense for dense, _ in stages) + experts == architecture.num_parameters


def test_what_is_shared_is_divided() -> None:
    whole, _, _ = planned("parallel={expert: 8}")
    zero, layout, architecture = planned("parallel={expert: 8, distributed_optimizer: true}")
    dense, expert = shard_parameters(architecture, layout, 0)
    assert whole.optimizer == 12 * (dense + expert)
    assert zero.optimizer == 12 * dense // 32 + 12 * expert // 4
    assert (zero.weights, zero.gradients) == (whole.weights, whole.gradients)
    full, _, _ = planned("parallel={expert: 8, recompute: full}")
    assert full.activations < whole.activations / 19
    assert whole.reference == 0
    assert planned("parallel={expert: 8}", "algorithm.kl.coeff=0.1")[0].reference == whole.weights
    assert planned("parallel={expert: 8}", "rollout.max_batch=1")[0].kv_cache < whole.kv_cache
    longer = ("rollout.max_response_tokens=8", "evaluation.max_response_tokens=64")
    in_turn = ("rollout.max_response_tokens=64", "evaluation.max_response_tokens=8")
    held_out, trained = (planned("parallel={expert: 8}", *limits)[0].kv_cache for limits in (longer, in_turn))
    assert held_out == trained > planned("parallel={expert: 8}", *longer, "evaluation.prompts=0")[0].kv_cache
    assert planned("parallel={expert: 8}", "model.fused_log_probs=false")[0].log_probs > whole.log_probs == 512 << 20
