"""What each key of an HF `config.json` means for the model; a key that is not known is refused. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gspo_moe.errors import ConfigError

HF_ARCHITECTURE = "Qwen3MoeForCausalLM"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What Qwen3MoeForCausalLM's forward pass does not depend on, as transformers 4 and 5 and their kin write it.
HARMLESS = _words(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path architectures
    attention_dropout attn_implementation dtype finetuning_task gspo_moe_version id2label label2id max_window_layers
    model_type name_or_path output_attentions output_hidden_states output_router_logits problem_type return_dict
    router_aux_loss_coef task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    bos_token_id decoder_start_token_id eos_token_id pad_token_id prefix sep_token_id
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    chunk_size_feed_forward cross_attention_hidden_size intermediate_size sliding_window
    """
)
# Read elsewhere: `config.rope`, and the second name of `num_experts`.
READ = _words(
    """
    num_local_experts original_max_position_embeddings partial_rotary_factor rope_parameters rope_scaling rope_theta
    """
)


def _empty(value: Any) -> bool:
    return not value


def _all_full(value: Any) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


def _only(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value in allowed


# Keys of which this model code knows one meaning: which values have it, and what to say of others.
CHECKED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mlp_only_layers": (_empty, "every layer must be MoE: []"),
    "decoder_sparse_step": (_only(1), "every layer must be MoE: 1"),
    "use_sliding_window": (_empty, "only full attention is supported: false"),
    "layer_types": (_all_full, "only full_attention is supported in each layer"),
    "attention_bias": (_empty, "only bias-free attention is supported: false"),
    "qkv_bias": (_empty, "only bias-free attention is supported: false"),
    "use_qk_norm": (_only(True), "only attention with q/k norms is supported: true"),
    "hidden_act": (_only("silu"), "only SwiGLU is supported: silu"),
    "mlp_bias": (_empty, "only bias-free experts are supported: false"),
    "router_jitter_noise": (_empty, "only routers without noise are supported: 0"),
    "shared_expert_intermediate_size": (_empty, "shared experts are not supported: 0"),
    "num_shared_experts": (_empty, "shared experts are not supported: 0"),
    "n_shared_experts": (_empty, "shared experts are not supported: 0"),
    "num_nextn_predict_layers": (_empty, "layers that predict further tokens are not supported: 0"),
    "pruned_heads": (_empty, "only whole layers are supported: {}"),
    "is_decoder": (_empty, "only a decoder by itself is supported: false"),
    "is_encoder_decoder": (_empty, "only a decoder by itself is supported: false"),
    "add_cross_attention": (_empty, "only a decoder by itself is supported: false"),
    "tie_encoder_decoder": (_empty, "only a decoder by itself is supported: false"),
    "quantization_config": (_empty, "quantized weights are not supported; give a checkpoint in bf16 or fp32"),
}


def check_keys(hf: Mapping[str, Any], fields: Mapping[str, Any], file: Path) -> None:
    """Refuses what this model code would not run as the file means it; null changes nothing, whatever its key.

    fields: names that become fields of the architecture. Raises ConfigError that names key, value and fix.
    """
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file}: architectures={names!r} is no list of names; give [{HF_ARCHITECTURE!r}]")
    if HF_ARCHITECTURE not in names and hf.get("model_type") != "qwen3_moe":
        raise ConfigError(f"{file} describes {names or hf.get('model_type')}; only {HF_ARCHITECTURE} is supported")
    for key, value in hf.items():
        if value is None or key in fields or key in HARMLESS or key in READ:
            continue
        if key not in CHECKED:
            raise ConfigError(
                f"{file}: unknown key {key}={value!r}, which may make it another model; if it does not change what the "
                "model computes, remove it from the file"
            )
        good, fix = CHECKED[key]
        if not good(value):
            raise ConfigError(f"{file}: {key}={value!r} is not supported; {fix}")
