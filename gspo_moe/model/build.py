"""Builds this rank's part of the model: one GPTModel a pipeline chunk."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.model.dispatch import use_ordered_dispatch
from gspo_moe.model.spec import block_spec, transformer_config
from gspo_moe.model.value import ValueHead
from gspo_moe.parallel.groups import Groups
from gspo_moe.platform import choose_backends, device, prepare_determinism


@dataclass
class Model:
    """This rank's chunks of one policy.

    chunks: GPTModels, or what training wrapped around them; more than one only under virtual pipelining.
    padded_vocab: rows of the embedding over all tensor ranks, a multiple of their number.
    vocab: how many of them, from the first, are tokens: the others are never sampled and have no part in any log-prob.
    fused_log_probs, log_prob_memory: as `model.fused_log_probs` and, in bytes, `model.log_prob_memory_mib`.
    deterministic: as `model.deterministic`.
    """

    architecture: Architecture
    config: TransformerConfig
    groups: Groups
    chunks: list[torch.nn.Module]
    padded_vocab: int
    vocab: int
    fused_log_probs: bool
    log_prob_memory: int
    deterministic: bool

    @property
    def gpt_chunks(self) -> list[GPTModel]:
        """The GPTModels inside whatever training wrapped around them."""
        return [unwrap(chunk) for chunk in self.chunks]


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    inner: Any = chunk
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


class Trunk(GPTModel):
    """A GPTModel whose last stage gives its final hidden states [1, P, H]; `model.last_stage` runs the output layer.

    Under sequence parallelism they are this rank's part of the pack.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states.transpose(0, 1).contiguous() if self.post_process else hidden_states


def build_model(
    config: Config,
    architecture: Architecture,
    groups: Groups,
    *,
    vocab: int | None = None,
    on_meta: bool = False,
    value_head: bool = False,
) -> Model:
    """Builds the chunks with uninitialised weights, on this process's device; `model.weights` fills them in.

    vocab: the tokenizer's vocabulary, None for every row of the architecture's.
    on_meta: builds shapes alone, which take no memory. value_head: the last chunk gets one, for PPO.
    Raises ConfigError where `model.backend` asks for layers that cannot run here.
    """
    layout = groups.layout
    backends = choose_backends(dict(config.model.backend), config.model.dtype)
    if config.model.deterministic:
        prepare_determinism()
    megatron_config = transformer_config(architecture, layout, config, backends)
    place = torch.device("meta") if on_meta else device().torch_device
    if on_meta:
        megatron_config.use_cpu_initialization = True  # else weights are made on a device named in code
    padded_vocab = -(-architecture.vocab_size // layout.tensor) * layout.tensor
    stages: list[int | None] = [None] if layout.virtual_pipeline is None else list(range(layout.virtual_pipeline))
    chunks: list[torch.nn.Module] = []
    for stage in stages:
        first, last = groups.is_first_stage, groups.is_last_stage
        if stage is not None:
            first = first and is_vp_first_stage(stage, layout.virtual_pipeline)
            last = last and is_vp_last_stage(stage, layout.virtual_pipeline)
        with place if on_meta else contextlib.nullcontext():
            chunk = Trunk(
                config=megatron_config,
                transformer_layer_spec=block_spec(architecture, megatron_config, backends, stage),
                vocab_size=padded_vocab,
                max_sequence_length=architecture.max_positions,
                pre_process=first,
                post_process=last,
                parallel_output=True,
                share_embeddings_and_output_weights=architecture.tie_word_embeddings,
                position_embedding_type="none",
                vp_stage=stage,
            )
        if last and value_head:
            chunk.value_head = ValueHead(megatron_config)
        _mark_tensor_parallel(chunk)
        use_ordered_dispatch(chunk)
        chunks.append(chunk.to(place))
    return Model(
        architecture,
        megatron_config,
        groups,
        chunks,
        padded_vocab,
        architecture.vocab_size if vocab is None else vocab,
        config.model.fused_log_probs,
        config.model.log_prob_memory_mib * 2**20,
        config.model.deterministic,
    )


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Says which weights are shards: megatron-core 0.16 does so while it initialises them, which it is told not to.

    Without the mark the gradient norm counts only the first tensor rank's shard.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dimension, stride=1)
