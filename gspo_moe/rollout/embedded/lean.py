"""Decode steps through the training weights without megatron-core's machinery.

`model.forward` runs packs through schedules, dispatchers and hooks, which cost a step of some ten tokens more than its
arithmetic. Here a layer is that arithmetic, with one sum over tensor ranks and, where experts are split, one gathering
and one sum. Invariants: log-probs and routes are those of `model.forward` but for rounding, in every layout; the host
learns nothing from the device.

Ranks that share the experts of a stage decode different sequences, unless they are tensor ranks of one copy. Each
gathers the others' tokens, in as many rows as the fullest rank has, runs its own experts on all of them, and what they
found is added up in fp32.

Shape letters: N this rank's tokens, one a row of the cache, M rows of the fullest rank, R rows of all that share the
experts, X rows by expert, one for each expert of a token, H hidden, Q query heads of a key head, G this rank's key
heads, D head size, P positions of the cache, K experts a token, L this stage's layers, V words of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_moe.model.attention import rotate
from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.model.last_stage import output_weight
from gspo_moe.model.rope import rotary_factors
from gspo_moe.rollout.embedded.expert_ranks import ExpertRanks
from gspo_moe.rollout.embedded.decoder import StepInput, StepOutput
from gspo_moe.routing.recorder import route_dtype


@dataclass(frozen=True)
class Layer:
    """One layer's weights, the parameters themselves. number: from 1, over all stages."""

    number: int
    attention_norm: torch.Tensor
    qkv: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    projection: torch.Tensor
    experts_norm: torch.Tensor
    router: torch.Tensor
    experts: GroupedExperts

    @classmethod
    def of(cls, module: Any) -> Layer:
        attention, moe = module.self_attention, module.mlp
        return cls(
            module.layer_number,
            module.input_layernorm.weight,
            attention.linear_qkv.weight,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            attention.linear_proj.weight,
            module.pre_mlp_layernorm.weight,
            moe.router.weight,
            moe.experts,
        )


@dataclass(frozen=True)
class Surroundings:
    """What all layers share in a step. cos_ND, sin_ND: rotary factors. bias_N11P: 0 where a position is seen, else -inf."""

    step: StepInput
    rows_N: torch.Tensor
    cos_ND: torch.Tensor
    sin_ND: torch.Tensor
    bias_N11P: torch.Tensor


class LeanForward:
    """Runs steps of one model over one cache. Collective over the ranks that hold the model and its experts."""

    def __init__(self, model: Model, cache: KVCache, *, records: bool) -> None:
        assert lean_obstacle(model) is None
        self._model = model
        self._cache = cache
        self._chunks = [[Layer.of(layer) for layer in gpt.decoder.layers] for gpt in model.gpt_chunks]
        self._ranks = ExpertRanks(model)
        self._dtype = route_dtype(model.architecture.num_experts) if records else None
        place = next(model.gpt_chunks[0].parameters()).device
        self._rows = torch.arange(cache.rows, device=place)
        self._positions = torch.arange(cache.capacity, device=place)
        cos_PD, sin_PD = rotary_factors(self._positions, model.architecture)
        self._cos_PD, self._sin_PD = (x.to(model.config.params_dtype) for x in (cos_PD, sin_PD))

    @torch.no_grad()
    def __call__(self, step: StepInput) -> StepOutput:
        around, routes = self._surroundings(step), list[torch.Tensor]()
        hidden_NH: torch.Tensor | None = None
        for number in range(len(self._chunks)):
            hidden_NH = self._enter(number, step)
            for layer in self._chunks[number]:
                hidden_NH = hidden_NH + self._attend(layer, hidden_NH, around)
                found_NH, routes_NK = self._mix(layer, hidden_NH, step.most)
                hidden_NH = hidden_NH + found_NH
                routes.append(routes_NK)
            self._leave(number, hidden_NH)
        assert hidden_NH is not None
        routes_NLK = None if self._dtype is None else torch.stack(routes, dim=1).to(self._dtype)
        return StepOutput(self._logits(hidden_NH) if self._model.groups.is_last_stage else None, routes_NLK)

    def _surroundings(self, step: StepInput) -> Surroundings:
        positions_N = step.positions_N
        hidden_NP = self._positions[: step.used] > positions_N[:, None]
        bias_NP = self._cos_PD.new_zeros(hidden_NP.shape).masked_fill_(hidden_NP, -torch.inf)
        return Surroundings(
            step,
            self._rows[: len(positions_N)],
            self._cos_PD[positions_N],
            self._sin_PD[positions_N],
            bias_NP[:, None, None],
        )

    def _enter(self, chunk: int, step: StepInput) -> torch.Tensor:
        """The hidden states [N, H] that this chunk starts from."""
        groups, gpt = self._model.groups, self._model.gpt_chunks[chunk]
        if gpt.pre_process:
            return self._embed(gpt.embedding.word_embeddings.weight, step.ids_N)
        shape = (len(step.ids_N), self._model.architecture.hidden_size)
        hidden_NH = torch.empty(shape, dtype=self._model.config.params_dtype, device=step.ids_N.device)
        dist.recv(hidden_NH, _neighbour(groups.pipeline, -1), group=groups.pipeline)
        return hidden_NH

    def _leave(self, chunk: int, hidden_NH: torch.Tensor) -> None:
        if not self._model.gpt_chunks[chunk].post_process:
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

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._model.config.layernorm_epsilon)

    def _attend(self, layer: Layer, hidden_NH: torch.Tensor, around: Surroundings) -> torch.Tensor:
        size = self._model.architecture.head_dim
        qkv_NX = F.linear(self._norm(hidden_NH, layer.attention_norm), layer.qkv)
        group = self._model.architecture.num_attention_heads // self._model.architecture.num_key_value_heads + 2
        qkv_NGXD = qkv_NX.view(len(qkv_NX), -1, group, size)
        query_NHD = self._norm(qkv_NGXD[:, :, :-2], layer.query_norm).flatten(1, 2)
        key_NGD = self._norm(qkv_NGXD[:, :, -2], layer.key_norm)
        query_NHD, key_NGD = (rotate(x, around.cos_ND, around.sin_ND) for x in (query_NHD, key_NGD))
        rows, used = around.rows_N, around.step.used
        keys, values = self._cache.write(layer.number, rows, around.step.positions_N, key_NGD, qkv_NGXD[:, :, -1])
        # The query heads of one key head lie beside each other as queries do, so that no key is copied for each.
        attended = F.scaled_dot_product_attention(
            query_NHD.unflatten(1, (keys.shape[1], -1)),
            keys[: len(rows), :, :used],
            values[: len(rows), :, :used],
            attn_mask=around.bias_N11P,
        )
        found_NH = F.linear(attended.flatten(1), layer.projection)
        if self._model.groups.tensor.size() > 1:
            dist.all_reduce(found_NH, group=self._model.groups.tensor)
        return found_NH

    def _mix(self, layer: Layer, hidden_NH: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts add [N, H], and which they were [N, K]."""
        normed_NH = self._norm(hidden_NH, layer.experts_norm)
        weights_NK, routes_NK = self._route(layer.router, normed_NH)
        return self._ranks.mix(layer.experts, normed_NH, weights_NK, routes_NK, most), routes_NK

    def _route(self, router_EH: torch.Tensor, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate weights and experts [N, K], best first, as megatron-core's topk_routing_with_score_function."""
        config, topk = self._model.config, self._model.architecture.num_experts_per_tok
        dtype = {"fp32": torch.float32, "fp64": torch.float64, None: hidden_NH.dtype}[config.moe_router_dtype]
        scores_NE = F.linear(hidden_NH.to(dtype), router_EH.to(dtype))
        if config.moe_router_pre_softmax:
            scores_NE = torch.softmax(scores_NE, dim=-1, dtype=torch.float32).to(dtype)
            weights_NK, routes_NK = scores_NE.topk(topk, dim=1)
            return weights_NK, routes_NK
        scores_NK, routes_NK = scores_NE.topk(topk, dim=1)
        return torch.softmax(scores_NK, dim=-1, dtype=torch.float32).to(dtype), routes_NK

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Behind each token, over the whole vocabulary."""
        gpt, tensor = self._model.gpt_chunks[-1], self._model.groups.tensor
        normed_NH = self._norm(hidden_NH, gpt.decoder.final_layernorm.weight)
        logits_NV = F.linear(normed_NH, output_weight(gpt))
        if tensor.size() > 1:
            parts = [torch.empty_like(logits_NV) for _ in range(tensor.size())]
            dist.all_gather(parts, logits_NV, group=tensor)
            logits_NV = torch.cat(parts, dim=1)
        return logits_NV[:, : self._model.vocab]


def lean_obstacle(model: Model) -> str | None:
    """Why steps of this model have to go through `model.forward`; None where they need not."""
    layers: Iterator[Any] = (layer for gpt in model.gpt_chunks for layer in gpt.decoder.layers)
    if not all(isinstance(layer.mlp.experts, GroupedExperts) for layer in layers):
        return "model.backend.experts is transformer_engine, whose experts run in its own modules"
    return None


def _neighbour(pipeline: dist.ProcessGroup, offset: int) -> int:
    return dist.get_global_rank(pipeline, (pipeline.rank() + offset) % pipeline.size())
