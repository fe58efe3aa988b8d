"""Rotary factors against transformers' rotary embedding, up to the last position that YaRN reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from gspo_moe.config.rope import Yarn
from gspo_moe.model.rope import rotary_factors
from tests.qwen3 import architecture

CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"factor": 4.0, "original_max_position_embeddings": 32_768},
    "tests' sizes": {"factor": 4.0, "original_max_position_embeddings": 32},
    "no factor": {"factor": 1.0, "original_max_position_embeddings": 4096},
    "betas": {"factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 8, "beta_slow": 2},
    "whole": {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False},
    "attention factor": {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 0.7},
    "mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.2},
    "mscale alone": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7},
    "one dimension": {"factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 3, "beta_slow": 3},
}


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("case", CASES)
def test_yarn_is_that_of_transformers(case: str, head_dim: int) -> None:
    sizes = architecture(head_dim=head_dim, rope_theta=1_000_000.0, rope_scaling=Yarn(**CASES[case]))
    position_ids = torch.tensor([0, 1, 2, 31, 4095, 32_768, 131_071])
    embedding = Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(**sizes.to_hf()))
    expected = embedding(torch.zeros(1), position_ids[None])
    unscaled = rotary_factors(position_ids, architecture(head_dim=head_dim, rope_theta=1_000_000.0))
    for found, theirs, plain in zip(rotary_factors(position_ids, sizes), expected, unscaled, strict=True):
        torch.testing.assert_close(found, theirs[0], atol=1e-6, rtol=0)
        assert (case == "no factor") == torch.allclose(found, plain)
