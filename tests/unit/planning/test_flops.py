"""The formula against torch's own count of the operations that transformers' model runs.

Its eager attention multiplies full squares, so where passes are compared the pairs are counted so; that causal
attention needs their lower triangle is counted by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gspo_moe.config.architecture import Architecture
from gspo_moe.planning.flops import TRAINING_PASSES, Work, forward_flops, generation, whole_sequences
from tests.qwen3 import architecture, reference_model

# Sizes without a common pattern, so that no two terms of the formula can stand in for each other.
SIZES = (
    architecture(),
    architecture(hidden_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                 moe_intermediate_size=20, num_experts=5, num_experts_per_tok=3, vocab_size=67),
    architecture(num_key_value_heads=4, num_experts_per_tok=1, norm_topk_prob=False, tie_word_embeddings=True),
)  # fmt: skip
MODULES = {
    "attention_projections": (".q_proj", ".k_proj", ".v_proj", ".o_proj"),
    "router": (".gate",),
    "experts": (".experts",),
    "lm_head": (".lm_head",),
}


def counted(sizes: Architecture, run: Callable[[Any], None]) -> dict[str, int]:
    """Operations of what `run` does with transformers' model, by module."""
    model = reference_model(sizes)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        run(model)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def parts(by_module: dict[str, int]) -> dict[str, int]:
    found = {part: in_modules(by_module, *endings) for part, endings in MODULES.items()}
    return {**found, "attention": in_modules(by_module, ".self_attn") - found["attention_projections"]}


def in_modules(by_module: dict[str, int], *endings: str) -> int:
    return sum(flops for name, flops in by_module.items() if name.endswith(endings))


def tokens(sizes: Architecture, length: int) -> torch.Tensor:
    return torch.arange(length)[None] % sizes.vocab_size


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("length", [1, 9])
def test_forward(sizes: Architecture, length: int) -> None:
    @torch.no_grad()
    def run(model: Any) -> None:
        model(input_ids=tokens(sizes, length))

    assert forward_flops(sizes, Work(length, length**2, length)) == parts(counted(sizes, run))


@pytest.mark.parametrize("sizes", SIZES)
def test_training_is_three_forwards(sizes: Architecture) -> None:
    def run(model: Any) -> None:
        model(input_ids=tokens(sizes, 9)).logits.sum().backward()

    by_module = counted(sizes, run)
    # The counter lays operations of the backward pass at wrong modules' doors, so only the sum can be compared.
    total = by_module["Global"] - in_modules(by_module, ".rotary_emb")
    assert total == TRAINING_PASSES * sum(forward_flops(sizes, Work(9, 81, 9)).values())


def test_generation_feeds_the_prompt_once_and_no_last_token() -> None:
    sizes, prompt, responses = SIZES[1], 7, (1, 4, 6)

    @torch.no_grad()
    def run(model: Any) -> None:
        first = model(input_ids=tokens(sizes, prompt), use_cache=True, logits_to_keep=1)
        for length in responses:
            cache = copy.deepcopy(first.past_key_values)
            for _ in range(length - 1):
                cache = model(input_ids=tokens(sizes, 1), past_key_values=cache, use_cache=True).past_key_values

    work = generation(prompt, responses)
    square = Work(work.tokens, work.pairs + prompt**2 - prompt * (prompt + 1) // 2, work.logits)
    assert forward_flops(sizes, square) == parts(counted(sizes, run))


def test_causal_attention_is_the_lower_triangle() -> None:
    lengths = (1, 2, 5, 13)
    work = whole_sequences(lengths)
    assert work.pairs == sum(int(torch.ones(n, n).tril().sum()) for n in lengths)
    assert work.tokens == work.logits == sum(lengths)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_token_meets_the_active_matrices(sizes: Architecture) -> None:
    flops = forward_flops(sizes, Work(tokens=1, logits=1))
    vectors = sizes.num_hidden_layers * 2 * (sizes.hidden_size + sizes.head_dim) + sizes.hidden_size
    look_up = 0 if sizes.tie_word_embeddings else sizes.vocab_size * sizes.hidden_size
    assert sum(flops.values()) == 2 * (sizes.num_active_parameters - vectors - look_up)
