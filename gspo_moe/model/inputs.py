"""Packs as the model takes them: padded where a layout needs it, the padding kept from experts and from the cache.

Padding is needed where sequence parallelism divides a pack, where context parallelism leaves a rank fewer tokens than
another, where the allgather dispatcher wants equally long packs on every rank, and where a rank has nothing to run
while its peers do. Invariant: padding tokens form sequences of their own behind the real ones and reach no expert
(`model.router`), so no real token's result or gradient depends on them.

Shape letters: T tokens of a pack, C this rank's tokens of it, P those with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_moe.model.attention import AttentionParams, context_params, decode_params, packed_params
from gspo_moe.model.build import Model
from gspo_moe.model.cache import CacheSlots, KVCache
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class ModelInput:
    """One pack, as a caller knows it; it may be empty.

    input_ids_T, position_ids_T: int64. cu_seqlens: int64 [N + 1], bounds of the sequences in T.
    cache: keys and values so far; padding goes to its last row, which the caller keeps free.
    rows_T: int64, each token's row of the cache.
    rows_in_order: they are 0, 1, 2, ..., which spares a copy of the cache.
    used: set where each row brings one new token: how many of the cache's positions to look at, more than any token's.
    split: which tokens this rank runs; None runs all of them. Never with a cache.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    cache: KVCache | None = None
    rows_T: torch.Tensor | None = None
    used: int | None = None
    rows_in_order: bool = False
    split: ContextSplit | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()


@dataclass(frozen=True)
class PaddedInput:
    """What a GPTModel is called with.

    padding_mask: True on padding, [1, P] bool, None without any. num_tokens: C. split: whose tokens they are.
    """

    input_ids_1P: torch.Tensor
    position_ids_1P: torch.Tensor
    attention: AttentionParams
    padding_mask: torch.Tensor | None
    num_tokens: int
    split: ContextSplit


def microbatch_input(microbatch: Microbatch, split: ContextSplit) -> ModelInput:
    return ModelInput(microbatch.input_ids_T, microbatch.position_ids_T, microbatch.cu_seqlens, split=split)


def response_positions(microbatch: Microbatch, split: ContextSplit) -> torch.Tensor:
    """Where this rank's response tokens are among its tokens, int64; waits for the device where a pack is shared."""
    if split.size == 1:
        return microbatch.response_positions_M
    return split.local(microbatch.response_mask_T).nonzero()[:, 0]


def pad_inputs(model: Model, inputs: Sequence[ModelInput]) -> list[PaddedInput]:
    """Pads each pack as this layout needs it. Collective over data and context ranks with the allgather dispatcher."""
    lengths = [max(1, *(item.split.counts if item.split else [item.num_tokens])) for item in inputs]
    if model.config.moe_token_dispatcher_type == "allgather":
        longest = torch.tensor(max(lengths), device=inputs[0].input_ids_T.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=model.groups.data_context)
        lengths = [int(longest)] * len(lengths)
    multiple = model.groups.layout.tensor if model.groups.layout.sequence_parallel else 1
    padded = [length + -length % multiple for length in lengths]
    return [
        _pad_whole(model, item, length)
        if item.split is None or item.split.size == 1
        else _pad_part(model, item, item.split, length)
        for item, length in zip(inputs, padded, strict=True)
    ]


def _pad_part(model: Model, item: ModelInput, split: ContextSplit, length: int) -> PaddedInput:
    assert item.cache is None
    count = split.num_local
    ids, positions = (
        F.pad(split.local(values_T), (0, length - count)) for values_T in (item.input_ids_T, item.position_ids_T)
    )
    # Given where nothing is padded too: else this rank's auxiliary loss would not count the others' real tokens.
    mask = torch.arange(length, device=ids.device) >= count
    attention = context_params(positions, split, model.architecture, model.config.params_dtype)
    return PaddedInput(ids[None], positions[None], attention, mask[None], count, split)


def _pad_whole(model: Model, item: ModelInput, length: int) -> PaddedInput:
    count = item.num_tokens
    extra = length - count
    ids, positions, bounds, rows = item.input_ids_T, item.position_ids_T, item.cu_seqlens, item.rows_T
    if extra:
        ids = torch.cat([ids, ids.new_zeros(extra)])
        positions = torch.cat([positions, positions.new_zeros(extra)])
        if rows is not None and item.cache is not None:
            rows = torch.cat([rows, rows.new_full((extra,), item.cache.rows - 1)])
    slots = None
    if item.cache is not None and rows is not None:
        slots = CacheSlots(item.cache, rows, positions, item.rows_in_order and not extra)
    attention: AttentionParams
    if item.used is None:
        bounds = _bounds_with_padding(bounds, count, length) if extra else bounds
        attention = packed_params(positions, bounds, model.architecture, model.config.params_dtype, slots)
    else:
        assert slots is not None, "there is no decoding without a cache"
        attention = decode_params(slots, item.used, model.architecture, model.config.params_dtype)
    mask = (torch.arange(length, device=ids.device) >= count)[None] if extra else None
    split = item.split or ContextSplit(item.cu_seqlens, total=count)
    return PaddedInput(ids[None], positions[None], attention, mask, count, split)


def _bounds_with_padding(bounds: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Bounds with sequences of padding behind, no longer than the real ones: attention may be a grid of the longest."""
    longest = int(bounds.diff().max()) if count else 1
    starts = torch.arange(count, length, longest, device=bounds.device)[1:]
    return torch.cat([bounds, starts, bounds.new_tensor([length])])
