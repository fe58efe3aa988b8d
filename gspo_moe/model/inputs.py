"""Packs as the model takes them: padded where a layout needs it, the padding kept from experts and from the cache.

Padding is needed where sequence parallelism divides a pack, where the allgather dispatcher wants equally long packs on
every rank, and where a rank has nothing to run while its peers do. Invariant: padding tokens form sequences of their
own behind the real ones and reach no expert (`model.router`), so no real token's result or gradient depends on them.

Shape letters: T tokens of a pack, P tokens with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_moe.model.attention import AttentionParams, KVCache, attention_params
from gspo_moe.model.build import Model
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class ModelInput:
    """One pack, as a caller knows it; it may be empty.

    input_ids_T, position_ids_T: int64. cu_seqlens: int64 [N + 1], bounds of the sequences in T.
    cache: keys and values so far; padding goes to its last row, which the caller keeps free.
    rows_T: int64, each token's row of the cache. decode: each row brings one new token.
    rows_in_order: rows_T is 0, 1, 2, ..., which spares a copy of the cache.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    cache: KVCache | None = None
    rows_T: torch.Tensor | None = None
    decode: bool = False
    rows_in_order: bool = False

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()


@dataclass(frozen=True)
class PaddedInput:
    """What a GPTModel is called with. padding_mask: True on padding, [1, P] bool, None without any."""

    input_ids_1P: torch.Tensor
    position_ids_1P: torch.Tensor
    attention: AttentionParams
    padding_mask: torch.Tensor | None
    num_tokens: int


def microbatch_input(microbatch: Microbatch) -> ModelInput:
    return ModelInput(microbatch.input_ids_T, microbatch.position_ids_T, microbatch.cu_seqlens)


def pad_inputs(model: Model, inputs: Sequence[ModelInput]) -> list[PaddedInput]:
    """Pads each pack as this layout needs it. Collective over data-parallel ranks with the allgather dispatcher."""
    lengths = [max(item.num_tokens, 1) for item in inputs]
    if model.config.moe_token_dispatcher_type == "allgather":
        longest = torch.tensor(max(lengths), device=inputs[0].input_ids_T.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=model.groups.data)
        lengths = [int(longest)] * len(lengths)
    multiple = model.groups.layout.tensor if model.groups.layout.sequence_parallel else 1
    return [_pad(model, item, length + -length % multiple) for item, length in zip(inputs, lengths, strict=True)]


def _pad(model: Model, item: ModelInput, length: int) -> PaddedInput:
    count = item.num_tokens
    extra = length - count
    ids, positions, bounds, rows = item.input_ids_T, item.position_ids_T, item.cu_seqlens, item.rows_T
    if extra:
        # Sequences no longer than the real ones: attention is laid out as a grid of the longest.
        longest = int(bounds.diff().max()) if count else 1
        starts = torch.arange(count, length, longest, device=ids.device)[1:]
        bounds = torch.cat([bounds, starts, bounds.new_tensor([length])])
        ids = torch.cat([ids, ids.new_zeros(extra)])
        positions = torch.cat([positions, positions.new_zeros(extra)])
        if rows is not None and item.cache is not None:
            rows = torch.cat([rows, rows.new_full((extra,), item.cache.rows - 1)])
    attention = attention_params(
        positions,
        bounds,
        model.architecture,
        cache=item.cache,
        rows_T=rows,
        decode=item.decode,
        rows_in_order=item.rows_in_order and not extra,
    )
    mask = (torch.arange(length, device=ids.device) >= count)[None] if extra else None
    return PaddedInput(ids[None], positions[None], attention, mask, count)
