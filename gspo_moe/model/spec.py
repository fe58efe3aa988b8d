"""The layer spec and TransformerConfig that make megatron-core's GPTModel a Qwen3 MoE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.kernels import has_layer_kernels, rms_norm
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.model.router import PaddingAwareRouter
from gspo_moe.model.torch_attention import TorchAttention
from gspo_moe.platform import Backend, Backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 leaves the name undefined where it has no Transformer Engine
    moe_utils.te_general_gemm = None


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under megatron-core's constructor; marks its weight so that sequence parallelism reduces it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        return normalized(x, self.weight, self.eps)


def normalized(x_XD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, by our kernel where there is one."""
    if has_layer_kernels(x_XD, weight_D):
        return rms_norm(x_XD, weight_D, eps)
    return F.rms_norm(x_XD, weight_D.shape, weight_D, eps)


class LocalProvider(LocalSpecProvider):
    """megatron-core's linear layers; its norm refuses sequence parallelism; attention packs, experts are stacked."""

    def layer_norm(self, *_: Any, **__: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return TorchAttention

    def grouped_mlp_modules(self, *_: Any) -> Any:
        # megatron-core takes a module with its submodules before 0.17 and one thing to call since.
        before = isinstance(super().grouped_mlp_modules(*_), tuple)
        return (GroupedExperts, None) if before else GroupedExperts


@dataclass(frozen=True)
class Providers:
    """Whose modules each part of a layer takes."""

    experts: BackendSpecProvider
    attention: BackendSpecProvider
    norms: BackendSpecProvider


def providers_of(backends: Backends) -> Providers:
    return Providers(*(_provider(part) for part in (backends.experts, backends.attention, backends.norms)))


def _provider(backend: Backend) -> BackendSpecProvider:
    if backend.name == "local":
        return LocalProvider()
    from gspo_moe.model.transformer_engine import SpecProvider

    return SpecProvider()


def transformer_config(
    architecture: Architecture, layout: Layout, config: Config, backends: Backends
) -> TransformerConfig:
    """megatron-core's config for this model under this layout.

    What stays off on every backend: `gradient_accumulation_fusion`, which needs a build of Apex, and
    `moe_permute_fusion`, whose kernel takes every token, padding too, to have K experts.
    """
    dtype = DTYPES[config.model.dtype]
    pipelined = layout.pipeline > 1
    interleaved = layout.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.moe_intermediate_size,
        moe_ffn_hidden_size=architecture.moe_intermediate_size,
        num_moe_experts=architecture.num_experts,
        moe_router_topk=architecture.num_experts_per_tok,
        moe_router_pre_softmax=not architecture.norm_topk_prob,
        moe_router_load_balancing_type="aux_loss" if config.routing.aux_loss_coeff else "none",
        moe_aux_loss_coeff=config.routing.aux_loss_coeff,
        moe_router_dtype=None if config.routing.router_dtype == "model" else config.routing.router_dtype,
        moe_token_dispatcher_type=config.parallel.dispatcher,
        moe_grouped_gemm=backends.experts.name == "transformer_engine",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # megatron-core refuses variable lengths with the allgather dispatcher, for which packs are equally long anyway.
        variable_seq_lengths=pipelined and config.parallel.dispatcher != "allgather",
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **_recompute(config.parallel.recompute),
    )


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if kind == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
    return {}


def layer_spec(architecture: Architecture, providers: Providers) -> ModuleSpec:
    """One decoder layer: RMSNorm, GQA with q/k norm, RMSNorm, router and experts."""
    norm = providers.norms.layer_norm(rms_norm=True)
    head_norm = providers.norms.layer_norm(rms_norm=True, for_qk=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=providers.attention.column_parallel_linear(),
            core_attention=providers.attention.core_attention(),
            linear_proj=providers.attention.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    experts = get_moe_module_spec_for_backend(
        providers.experts,
        num_experts=architecture.num_experts,
        moe_grouped_gemm=not isinstance(providers.experts, LocalSpecProvider),
    )
    # megatron-core gives a ModuleSpec before 0.17 and a partial since.
    submodules = experts.keywords["submodules"] if isinstance(experts, partial) else experts.submodules
    submodules.router = PaddingAwareRouter
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=experts,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    architecture: Architecture, config: TransformerConfig, backends: Backends, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (of its chunk `virtual_stage`, when interleaved) and the final norm."""
    providers = providers_of(backends)
    count = get_num_layers_to_build(config, vp_stage=virtual_stage)
    layers = [layer_spec(architecture, providers)] * count
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=providers.norms.layer_norm(rms_norm=True))
