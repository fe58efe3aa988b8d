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
        ({"rope_scaling": {"rope_type": "yarn"}}, ("rope_type", "default")),
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


def test_missing_broken_and_incomplete_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="does not exist"):
        architecture_from_hf(tmp_path)
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        architecture_from_hf(tmp_path)
    file.write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(ConfigError, match=r"lacks vocab_size, hidden_size"):
        architecture_from_hf(tmp_path)
