"""Presets against the published sizes, and HF's config.json both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config import PRESETS, Architecture, ConfigError, architecture_from_hf


@pytest.mark.parametrize(
    ("preset", "billions", "active_billions"),
    # The totals on the models' cards (30.5 and 3.3, 235 and 22, 480 and 35).
    [("qwen3_30b_a3b", 30.5, 3.3), ("qwen3_235b_a22b", 235, 22), ("qwen3_coder_480b_a35b", 480, 35)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, billions: float, active_billions: float) -> None:
    architecture = Architecture(**PRESETS[preset])
    assert architecture.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert architecture.num_active_parameters / 1e9 == pytest.approx(active_billions, rel=0.02)


def test_hf_config_gives_the_architecture_back(tmp_path: Path) -> None:
    architecture = Architecture(**PRESETS["tiny"], vocab_size=54, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(architecture.to_hf()))
    assert architecture_from_hf(tmp_path) == architecture_from_hf(tmp_path / "config.json") == architecture


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"mlp_only_layers": [0]}, ("mlp_only_layers=[0]", "every layer must be MoE")),
        ({"decoder_sparse_step": 2}, ("decoder_sparse_step=2", "every layer must be MoE")),
        ({"use_sliding_window": True}, ("use_sliding_window=True", "false")),
        ({"attention_bias": True}, ("attention_bias=True", "false")),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "silu")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types=", "only full_attention")),
        ({"router_jitter_noise": 0.1}, ("router_jitter_noise=0.1", "0")),
        ({"use_qk_norm": False}, ("use_qk_norm=False", "true")),
        ({"shared_expert_intermediate_size": 64}, ("shared_expert_intermediate_size=64", "not supported")),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            ("quantization_config=", "not supported; give a checkpoint"),
        ),
        ({"dual_chunk_attention_config": {"chunk_size": 9}}, ("unknown key dual_chunk_attention_config=", "remove it")),
        ({"logit_scale": False}, ("unknown key logit_scale=False", "remove it")),
        ({"num_local_experts": 4}, ("num_experts=16", "num_local_experts=4", "keep one")),
        ({"rms_norm_eps": float("inf")}, ("rms_norm_eps=inf", "finite")),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ("Llama", "Qwen3MoeForCausalLM")),
        ({"num_key_value_heads": 3}, ("config.json", "num_key_value_heads=3", "choose a divisor")),
        ({"num_experts": "many"}, ("config.json", "num_experts='many'", "integer")),
    ],
)
def test_hf_configs_that_this_model_code_cannot_run_are_refused(
    tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    hf = Architecture(**PRESETS["tiny"], vocab_size=54).to_hf() | change
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ConfigError) as caught:
        architecture_from_hf(tmp_path)
    for part in parts:
        assert part in str(caught.value)


# Qwen3-30B-A3B's, Qwen3-Coder-30B-A3B-Instruct's and what transformers 4's `to_dict` adds, but for sizes.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": [151645, 151643], "hidden_act": "silu", "intermediate_size": 6144,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "output_router_logits": False,
    "qkv_bias": False, "rope_scaling": None, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 0,
    "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_qk_norm": True, "use_sliding_window": False, "_name_or_path": "", "return_dict": True, "pruned_heads": {},
    "is_decoder": False, "top_k": 50, "id2label": {"0": "LABEL_0"}, "layer_types": ["full_attention"] * 4,
    "a_key_of_the_future": None, "gspo_moe_version": "0.1",
}  # fmt: skip


def test_published_configs_and_all_that_transformers_writes_are_read(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    architecture = Architecture(**PRESETS["tiny"], vocab_size=151_936)
    for hf in (architecture.to_hf() | PUBLISHED, Qwen3MoeConfig(**architecture.to_hf()).to_dict()):
        (tmp_path / "config.json").write_text(json.dumps(hf))
        assert architecture_from_hf(tmp_path) == architecture


def test_configs_of_runs_before_rope_scaling_are_read(tmp_path: Path) -> None:
    architecture = Architecture(**PRESETS["tiny"], vocab_size=54)
    hf = architecture.to_hf()
    del hf["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert architecture_from_hf(tmp_path) == architecture


def test_missing_broken_and_incomplete_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="does not exist"):
        architecture_from_hf(tmp_path)
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        architecture_from_hf(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="no keys with values"):
        architecture_from_hf(tmp_path)
    file.write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(ConfigError, match=r"lacks vocab_size, hidden_size"):
        architecture_from_hf(tmp_path)
