"""Decode steps through the training weights without megatron-core's machinery.

`model.forward` runs packs through schedules, dispatchers and hooks, which cost a step of some ten tokens more than its
arithmetic. Here a layer is that arithmetic, with one sum over tensor ranks and, where experts are split, one gathering
and one sum. Invariants: log-probs and routes are those of `model.forward` but for rounding, in every layout; the host
learns nothing from the device.

Ranks that share the experts of a stage decode different sequences, unless they are tensor ranks of one copy. Each
gathers the others' tokens, in as many rows as the fullest rank has, runs its own experts on all of them, and what they
found is added up in fp32.

Shape letters: N this rank's tokens, one a row of the cache, M rows of the fullest rank, R rows of all that share the
experts, H hidden, G this rank's key heads, X a key head's query heads, its key and its value, D head size, P positions
of the cache, K experts a token, E all experts, L this stage's layers, V words of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.model.last_stage import output_weight
from gspo_moe.model.rope import rotary_factors
from gspo_moe.rollout.embedded.arithmetic import (
    Arithmetic,
    Experts,
    HeadNorms,
    Surroundings,
    Weights,
    arithmetic_for,
)
from gspo_moe.rollout.embedded.decoder import StepInput, StepOutput
from gspo_moe.rollout.embedded.expert_ranks import ExpertRanks
from gspo_moe.rollout.embedded.numerics import RoundInputs
from gspo_moe.routing.recorder import route_dtype

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, None: None}


@dataclass(frozen=True)
class Layer:
    """One layer's weights as arithmetic holds them. number: from 1, over all stages."""

    number: int
    attention_norm: torch.Tensor
    qkv: Weights
    head_norms: HeadNorms
    projection: Weights
    experts_norm: torch.Tensor
    router: Weights
    experts: Experts

    @classmethod
    def of(cls, module: Any, do: Arithmetic, router: Weights) -> Layer:
        attention = module.self_attention
        return cls(
            module.layer_number,
            module.input_layernorm.weight,
            do.hold(attention.linear_qkv.weight),
            HeadNorms(attention.q_layernorm.weight, attention.k_layernorm.weight),
            do.hold(attention.linear_proj.weight),
            module.pre_mlp_layernorm.weight,
            router,
            do.hold_experts(module.mlp.experts),
        )


class LeanForward:
    """Runs steps of one model over one cache. Collective over the ranks that hold the model and its experts.

    round_inputs: what is done to the inputs of attention's linear layers; experts do it themselves.
    """

    def __init__(self, model: Model, cache: KVCache, *, records: bool, round_inputs: RoundInputs | None = None) -> None:
        assert lean_obstacle(model) is None
        self._model = model
        self._cache = cache
        self._round_inputs = round_inputs
        layers = [list(gpt.decoder.layers) for gpt in model.gpt_chunks]
        weight, router = layers[0][0].self_attention.linear_qkv.weight, layers[0][0].mlp.router.weight
        self._router_dtype = _ROUTER_DTYPES[model.config.moe_router_dtype] or router.dtype
        epsilon = model.config.layernorm_epsilon
        self._do = arithmetic_for(weight, epsilon)
        self._router_do = arithmetic_for(router.to(self._router_dtype), epsilon)
        self._chunks = [[self._held(layer) for layer in chunk] for chunk in layers]
        self._output = self._do.hold(output_weight(model.gpt_chunks[-1])) if model.groups.is_last_stage else None
        self._ranks = ExpertRanks(model)
        self._dtype = route_dtype(model.architecture.num_experts) if records else None
        cos_PD, sin_PD = rotary_factors(torch.arange(cache.capacity, device=weight.device), model.architecture)
        self._cos_PD, self._sin_PD = (factors.to(model.config.params_dtype) for factors in (cos_PD, sin_PD))

    def _held(self, module: Any) -> Layer:
        router = self._router_do.hold(module.mlp.router.weight.to(self._router_dtype))
        return Layer.of(module, self._do, router)

    @torch.no_grad()
    def __call__(self, step: StepInput) -> StepOutput:
        routes = list[torch.Tensor]()
        self._do.begin(Surroundings(step.positions_N, self._cos_PD, self._sin_PD, step.used))
        hidden_NH: torch.Tensor | None = None
        for number in range(len(self._chunks)):
            hidden_NH = self._enter(number, step)
            for layer in self._chunks[number]:
                hidden_NH = hidden_NH + self._attend(layer, hidden_NH)
                found_NH, routes_NK = self._mix(layer, hidden_NH, step.most)
                hidden_NH = hidden_NH + found_NH
                routes.append(routes_NK)
            self._leave(number, hidden_NH)
        assert hidden_NH is not None
        routes_NLK = None if self._dtype is None else torch.stack(routes, dim=1).to(self._dtype)
        return StepOutput(self._logits(hidden_NH) if self._model.groups.is_last_stage else None, routes_NLK)

    def _enter(self, chunk: int, step: StepInput) -> torch.Tensor:
        """The hidden states [N, H] that this chunk starts from."""
        groups, gpt = self._model.groups, self._model.gpt_chunks[chunk]
        if gpt.pre_process:
            return self._embed(gpt.embedding.word_embeddings.weight, step.ids_N)
        shape = (len(step.ids_N), self._model.architecture.hidden_size)
        hidden_NH = torch.empty(shape, dtype=self._model.config.params_dtype, device=step.ids_N.device)
        if len(hidden_NH):
            dist.recv(hidden_NH, _neighbour(groups.pipeline, -1), group=groups.pipeline)
        return hidden_NH

    def _leave(self, chunk: int, hidden_NH: torch.Tensor) -> None:
        if len(hidden_NH) and not self._model.gpt_chunks[chunk].post_process:
            pipeline = self._model.groups.pipeline
            dist.send(hidden_NH.contiguous(), _neighbour(pipeline, 1), group=pipeline)

    def _embed(self, weight_VH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        tensor = self._model.groups.tensor
        if tensor.size() == 1:
            return F.embedding(ids_N, weight_VH)
        local_N = ids_N - tensor.rank() * len(weight_VH)
        elsewhere_N1 = ((local_N < 0) | (local_N >= len(weight_VH)))[:, None]
        hidden_NH = F.embedding(local_N.clamp(0, len(weight_VH) - 1), weight_VH).masked_fill(elsewhere_N1, 0)
        dist.all_reduce(hidden_NH, group=tensor)
        return hidden_NH

    def _attend(self, layer: Layer, hidden_NH: torch.Tensor) -> torch.Tensor:
        if not len(hidden_NH):  # on all ranks of a tensor group
            return hidden_NH
        sizes, tensor = self._model.architecture, self._model.groups.tensor
        heads = sizes.num_attention_heads // sizes.num_key_value_heads + 2
        qkv_NX = self._linear(self._do.norm(hidden_NH, layer.attention_norm), layer.qkv)
        qkv_NGXD = qkv_NX.view(len(qkv_NX), -1, heads, sizes.head_dim)
        attended_NX = self._do.attend(qkv_NGXD, layer.head_norms, self._cache.layer(layer.number))
        found_NH = self._linear(attended_NX, layer.projection)
        if tensor.size() > 1:
            dist.all_reduce(found_NH, group=tensor)
        return found_NH

    def _linear(self, values_NX: torch.Tensor, weights: Weights) -> torch.Tensor:
        rounded_NX = values_NX if self._round_inputs is None else self._round_inputs(values_NX)
        return self._do.linear(rounded_NX, weights)

    def _mix(self, layer: Layer, hidden_NH: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts add [N, H], and which they were [N, K]."""
        normed_NH = self._do.norm(hidden_NH, layer.experts_norm)
        weights_NK, routes_NK = self._route(layer.router, normed_NH)
        return self._ranks.mix(self._do, layer.experts, normed_NH, weights_NK, routes_NK, most), routes_NK

    def _route(self, router: Weights, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate weights and experts [N, K], best first, as megatron-core's topk_routing_with_score_function."""
        config, topk = self._model.config, self._model.architecture.num_experts_per_tok
        dtype = self._router_dtype
        scores_NE = self._router_do.linear(hidden_NH.to(dtype), router)
        if config.moe_router_pre_softmax:
            scores_NE = torch.softmax(scores_NE, dim=-1, dtype=torch.float32).to(dtype)
            weights_NK, routes_NK = scores_NE.topk(topk, dim=1)
            return weights_NK, routes_NK
        scores_NK, routes_NK = scores_NE.topk(topk, dim=1)
        return torch.softmax(scores_NK, dim=-1, dtype=torch.float32).to(dtype), routes_NK

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Behind each token, over the whole vocabulary."""
        gpt, tensor = self._model.gpt_chunks[-1], self._model.groups.tensor
        normed_NH = self._do.norm(hidden_NH, gpt.decoder.final_layernorm.weight)
        assert self._output is not None
        return gather_vocab(self._do.linear(normed_NH, self._output), tensor)[:, : self._model.vocab]


def gather_vocab(logits_NV: torch.Tensor, tensor: dist.ProcessGroup) -> torch.Tensor:
    """Every tensor rank's columns side by side, with the padding. Collective over them."""
    if tensor.size() == 1:
        return logits_NV
    parts = [torch.empty_like(logits_NV) for _ in range(tensor.size())]
    dist.all_gather(parts, logits_NV.contiguous(), group=tensor)
    return torch.cat(parts, dim=1)


def lean_obstacle(model: Model) -> str | None:
    """Why steps of this model have to go through `model.forward`; None where they need not."""
    layers: Iterator[Any] = (layer for gpt in model.gpt_chunks for layer in gpt.decoder.layers)
    if not all(isinstance(layer.mlp.experts, GroupedExperts) for layer in layers):
        return "model.backend.experts is transformer_engine, whose experts run in its own modules"
    return None


def _neighbour(pipeline: dist.ProcessGroup, offset: int) -> int:
    return dist.get_global_rank(pipeline, (pipeline.rank() + offset) % pipeline.size())
