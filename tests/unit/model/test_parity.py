"""Against transformers' Qwen3MoeForCausalLM with the same weights, fp32, one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.rope import Yarn
from gspo_moe.model.weights import SafetensorsSource
from tests.qwen3 import (
    architecture,
    built,
    cached_logits,
    forward_logits,
    layout,
    random_sequences,
    reference_logits,
    reference_model,
)

YARN = Yarn(factor=4.0, original_max_position_embeddings=8)  # most positions below lie beyond the original ones
# Each GQA ratio, k, expert count, tying, renormalisation and layer count in turn; k = 1 has nothing to renormalise.
SHAPES: list[dict[str, Any]] = [
    {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False},
    {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 67, "num_hidden_layers": 3},
    {"num_attention_heads": 8, "num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": False, "head_dim": 6},
    {"num_key_value_heads": 4, "tie_word_embeddings": True, "norm_topk_prob": False, "rope_theta": 1_000_000.0},
    {"rope_scaling": YARN, "num_key_value_heads": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_ragged_packs_match_transformers_by_sequence(shape: dict[str, Any], tmp_path: Path) -> None:
    sizes = architecture(**shape)
    reference = reference_model(sizes)
    reference.save_pretrained(tmp_path)
    packs = [random_sequences(sizes, (1, 5, 23, 3), seed=1), random_sequences(sizes, (12,), seed=2)]
    with built(sizes, layout(), SafetensorsSource(tmp_path)) as model:
        logits = forward_logits(model, packs)
    for pack, found in zip(packs, logits, strict=True):
        for expected, actual in zip(reference_logits(reference, pack), found, strict=True):
            assert expected.std() > 0.5
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("key_value_heads", "scaling"), [(1, None), (2, YARN), (4, None)])
def test_prefill_and_decoding_with_the_cache_equal_the_full_forward(
    key_value_heads: int, scaling: Yarn | None, tmp_path: Path
) -> None:
    sizes = architecture(num_key_value_heads=key_value_heads, rope_scaling=scaling)
    reference_model(sizes).save_pretrained(tmp_path)
    sequences = random_sequences(sizes, (9, 6, 12), seed=3)
    with built(sizes, layout(), SafetensorsSource(tmp_path)) as model:
        (full,) = forward_logits(model, [sequences])
        cached = cached_logits(model, sequences, prompt_lengths=(4, 4, 1))
    for actual, expected in zip(cached, full, strict=True):
        torch.testing.assert_close(torch.stack(actual), expected, atol=1e-5, rtol=0)


def test_a_token_does_not_see_the_other_sequences_of_its_pack(tmp_path: Path) -> None:
    sizes = architecture()
    reference_model(sizes).save_pretrained(tmp_path)
    first, second, other = random_sequences(sizes, (7, 11, 15), seed=4)
    with built(sizes, layout(), SafetensorsSource(tmp_path)) as model:
        ((_, beside_first), (_, beside_other)) = forward_logits(model, [[first, second], [other, second]])
    torch.testing.assert_close(beside_first, beside_other, atol=1e-5, rtol=0)
