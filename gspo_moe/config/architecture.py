"""Sizes of a Qwen3 MoE: the shipped presets and any HF `config.json` of Qwen3MoeForCausalLM. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gspo_moe.config.hf_keys import HF_ARCHITECTURE, check_keys
from gspo_moe.config.rope import Yarn, read_rope
from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError
from gspo_moe.plain_json import read_object
from gspo_moe.section import Section

# What transformers takes for keys that a config.json leaves out.
HF_DEFAULTS = {"norm_topk_prob": False, "max_position_embeddings": 32_768}

Size = Annotated[int, Field(gt=0, lt=1 << 31)]
Small = Annotated[float, Field(gt=0, le=1)]


class Architecture(Section):
    """One Qwen3 MoE decoder: GQA with q/k RMSNorm, RoPE, SwiGLU experts, top-k softmax routing, no shared expert.

    Names are HF's where HF has one; `head_dim` is free of `hidden_size / num_attention_heads`.
    rope_scaling: YaRN, or None for RoPE as it is.
    Built from user input by `validated`, which turns sizes that do not divide into a ConfigError.
    """

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    moe_intermediate_size: Size
    num_experts: Size
    num_experts_per_tok: Size
    norm_topk_prob: bool = True
    rope_theta: Annotated[float, Field(gt=0, le=1e12)] = 1_000_000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: Small = 1e-6
    max_position_embeddings: Size = 40_960
    tie_word_embeddings: bool = False
    initializer_range: Small = 0.02

    def faults(self) -> Iterator[str]:
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose a divisor"
            )
        if self.num_experts_per_tok > self.num_experts:
            yield f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}; lower it"
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            yield (
                "num_experts_per_tok=1 with norm_topk_prob=true weighs every expert by 1, so the router never learns; "
                "set norm_topk_prob=false"
            )
        if self.head_dim % 2:
            yield f"head_dim={self.head_dim} must be even: RoPE rotates pairs"
        if self.rope_scaling is not None and self.rope_theta <= 1:
            yield f"rope_theta={self.rope_theta} must exceed 1 for YaRN; give the model's own"

    @property
    def max_positions(self) -> int:
        """The most tokens of a sequence: `max_position_embeddings`, or what YaRN extends the original ones to.

        Qwen documents YaRN as a change of `rope_scaling` alone, which leaves `max_position_embeddings` as it is.
        """
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * scaling.original_max_position_embeddings))

    @property
    def num_parameters(self) -> int:
        """Parameters in all, embeddings included (tied ones once)."""
        return self._embedding_parameters() + self.num_hidden_layers * (
            self._dense_layer_parameters() + self.num_experts * self._expert_parameters()
        )

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts it was not routed to."""
        return self._embedding_parameters() + self.num_hidden_layers * (
            self._dense_layer_parameters() + self.num_experts_per_tok * self._expert_parameters()
        )

    def _embedding_parameters(self) -> int:
        copies = 1 if self.tie_word_embeddings else 2
        return copies * self.vocab_size * self.hidden_size + self.hidden_size

    def _dense_layer_parameters(self) -> int:
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_key_value_heads * self.head_dim
        norms = 2 * self.hidden_size + 2 * self.head_dim
        return self.hidden_size * (2 * query + key_value) + norms + self.hidden_size * self.num_experts

    def _expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads for this architecture."""
        return {
            "architectures": [HF_ARCHITECTURE],
            "model_type": "qwen3_moe",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "use_sliding_window": False,
            **self.model_dump(),
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling is not None else None,
        }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2, "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
    },
    "small": {
        "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "moe_intermediate_size": 32, "num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
    },
    "qwen3_30b_a3b": {
        "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "qwen3_235b_a22b": {
        "vocab_size": 151_936, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "qwen3_coder_480b_a35b": {
        "vocab_size": 151_936, "hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "moe_intermediate_size": 2560, "num_experts": 160,
        "num_experts_per_tok": 8, "rope_theta": 10_000_000.0, "max_position_embeddings": 262_144,
    },
}  # fmt: skip


def architecture_from_hf(path: str | Path) -> Architecture:
    """Reads an HF `config.json` (or the folder that holds it).

    Raises ConfigError for a missing file, another architecture, a feature that this model code does not have (dense
    layers among the MoE layers, RoPE scaled otherwise than by YaRN, sliding windows, attention bias), and a key that is
    not known.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the folder of an HF checkpoint of {HF_ARCHITECTURE}")
    try:
        hf = read_object(file)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON of a config ({error}); export the model again") from error
    check_keys(hf, Architecture.model_fields, file)
    _take_num_experts(hf, file)
    _check_end_tokens(hf, file)
    values = HF_DEFAULTS | {name: hf[name] for name in Architecture.model_fields if name in hf}
    values["rope_theta"], values["rope_scaling"] = read_rope(hf, file)
    hidden, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    if values.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        values["head_dim"] = hidden // heads
    missing = [name for name, info in Architecture.model_fields.items() if info.is_required() and name not in values]
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(missing)}; it is no complete config of {HF_ARCHITECTURE}")
    return validated(Architecture, values, prefix=f"{file}: ")


def _check_end_tokens(hf: dict[str, Any], file: Path) -> None:
    given, vocab_size = hf.get("eos_token_id"), hf.get("vocab_size")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ConfigError(f"{file}: eos_token_id={given!r} is neither an id nor a list of ids; correct it")
    if type(vocab_size) is int and max(ids, default=0) >= max(vocab_size, 1):
        raise ConfigError(f"{file}: eos_token_id={given!r} is outside vocab_size={vocab_size}; correct it")


def _take_num_experts(hf: dict[str, Any], file: Path) -> None:
    """`num_local_experts` is what transformers 5 writes."""
    theirs = hf.get("num_local_experts")
    if theirs is not None and hf.setdefault("num_experts", theirs) != theirs:
        raise ConfigError(f"{file}: num_experts={hf['num_experts']!r} and num_local_experts={theirs!r}; keep one")
