"""Against transformers' Qwen3MoeForCausalLM with the same weights, fp32, one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.model.attention import KVCache
from gspo_moe.model.forward import run
from gspo_moe.model.weights import SafetensorsSource
from tests.qwen3 import (
    architecture,
    built,
    forward_logits,
    layout,
    packed,
    random_sequences,
    reference_logits,
    reference_model,
)

# Each GQA ratio, k, expert count, tying, renormalisation and layer count in turn; k = 1 has nothing to renormalise.
SHAPES: list[dict[str, Any]] = [
    {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False},
    {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 67, "num_hidden_layers": 3},
    {"num_attention_heads": 8, "num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": False, "head_dim": 6},
    {"num_key_value_heads": 4, "tie_word_embeddings": True, "norm_topk_prob": False, "rope_theta": 1_000_000.0},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_ragged_packs_match_transformers_run_sequence_by_sequence(shape: dict[str, Any], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_decoding_with_the_cache_equals_the_full_forward(key_value_heads: int, tmp_path: Path) -> None:
    sizes = architecture(num_key_value_heads=key_value_heads)
    reference_model(sizes).save_pretrained(tmp_path)
    sequences = random_sequences(sizes, (9, 6, 12), seed=3)
    prompts = (4, 1, 7)
    with built(sizes, layout(), SafetensorsSource(tmp_path)) as model:
        (full,) = forward_logits(model, [sequences])

        def forward(tokens: list[torch.Tensor], **cached: Any) -> torch.Tensor:
            item = packed(model, tokens, **cached)
            (logits_TV,) = run(model, [item], lambda _, logits_TV: (None, logits_TV), backward=False)
            return logits_TV

        cache = KVCache(rows=len(sequences), capacity=12)
        rows = torch.repeat_interleave(torch.arange(3), torch.tensor(prompts))
        heads = [sequence[:count] for sequence, count in zip(sequences, prompts, strict=True)]
        prefilled = forward(heads, cache=cache, rows_T=rows).split(prompts)
        for actual, whole, count in zip(prefilled, full, prompts, strict=True):
            torch.testing.assert_close(actual, whole[:count], atol=1e-5, rtol=0)
