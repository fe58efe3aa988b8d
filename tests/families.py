"""Tiny random models of transformers 5's MoE families."""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "num_experts": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "first_k_dense_replace": 0, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_key_value_heads": 4, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 2.5, "head_dim": 8,
}  # fmt: skip
LOCAL = {"num_local_experts": 8}
# Class prefix, config's changes, the score that its router weighs by.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2Moe": ({"shared_expert_intermediate_size": 24}, "softmax"),
    "Qwen3Moe": ({}, "softmax"),
    "Qwen3Next": (LINEAR, "softmax"),
    "Qwen3_5MoeText": (LINEAR, "softmax"),
    "Olmoe": ({"head_dim": 8}, "softmax"),
    "Mixtral": (LOCAL, "softmax"),
    "DeepseekV2": (LATENT | {"topk_method": "group_limited_greedy"}, "softmax"),
    "DeepseekV3": (LATENT, "sigmoid"),
    "GptOss": (LOCAL, "softmax"),
    "Glm4Moe": ({"first_k_dense_replace": 0, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}, "sigmoid"),
    "Ernie4_5_Moe": ({"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0}, "softmax"),
    "MiniMaxM2": (LOCAL | {"rotary_dim": 8}, "sigmoid"),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A `<family>ForCausalLM` in evaluation mode whose router's choices are not near ties."""
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**COMMON, **FAMILIES[family][0], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and response mask [3, 10], padded on the right."""
    ids = torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(seed))
    lengths, prompts = torch.tensor([10, 7, 9])[:, None], torch.tensor([3, 2, 4])[:, None]
    position = torch.arange(10)[None]
    attention = position < lengths
    return torch.where(attention, ids, 0), attention.long(), ((position >= prompts) & attention).long()
