"""Runs packs through megatron-core's pipeline schedule: the one way in which every forward and backward happens.

Training, scoring, evaluation and generation all come through `run`, so they share packing, padding and vocabulary
handling. Shape letters: T tokens of a pack, P tokens with padding, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from gspo_moe.model.attention import AttentionParams, KVCache, attention_params
from gspo_moe.model.build import Model
from gspo_moe.parallel.vocab import vocab_parallel_first_choice, vocab_parallel_log_probs
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class ModelInput:
    """One pack as the model takes it: a multiple of the tensor-parallel size long, under sequence parallelism.

    num_tokens: real tokens T; the padding behind them forms sequences of its own.
    """

    input_ids_1P: torch.Tensor
    position_ids_1P: torch.Tensor
    attention: AttentionParams
    num_tokens: int


class Head(Protocol):
    """What the last stage makes of a pack's logits [T, V]: a loss to differentiate (or None) and anything to keep."""

    def __call__(self, index: int, logits_TV: torch.Tensor) -> tuple[torch.Tensor | None, Any]: ...


RecordScope = Callable[[int, torch.nn.Module, int], contextlib.AbstractContextManager[None]]


def no_recording(index: int, chunk: torch.nn.Module, num_tokens: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def model_input(
    model: Model,
    input_ids_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cache: KVCache | None = None,
    rows_T: torch.Tensor | None = None,
    decode: bool = False,
    rows_in_order: bool = False,
) -> ModelInput:
    """Pads a pack to what sequence parallelism divides and prepares its attention.

    With a cache, padding tokens go to its last row, which the caller keeps free for them.
    """
    count = input_ids_T.numel()
    multiple = model.groups.layout.tensor if model.groups.layout.sequence_parallel else 1
    extra = -count % multiple
    if extra:
        input_ids_T = torch.cat([input_ids_T, input_ids_T.new_zeros(extra)])
        position_ids_T = torch.cat([position_ids_T, torch.arange(extra, device=position_ids_T.device)])
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + extra])
        if rows_T is not None and cache is not None:
            rows_T = torch.cat([rows_T, rows_T.new_full((extra,), cache.rows - 1)])
    attention = attention_params(
        position_ids_T,
        cu_seqlens,
        model.architecture,
        cache=cache,
        rows_T=rows_T,
        decode=decode,
        rows_in_order=rows_in_order and not extra,
    )
    return ModelInput(input_ids_T[None], position_ids_T[None], attention, count)


def microbatch_input(model: Model, microbatch: Microbatch) -> ModelInput:
    return model_input(model, microbatch.input_ids_T, microbatch.position_ids_T, microbatch.cu_seqlens)


def run(
    model: Model,
    inputs: Sequence[ModelInput],
    head: Head,
    *,
    backward: bool,
    record: RecordScope = no_recording,
) -> list[Any]:
    """Runs every pack forward (and backward) through the pipeline; what `head` kept, in order, on the last stage.

    Other stages get an empty list. The loss that `head` returns is summed over packs: megatron-core's division by the
    number of packs is undone here. Gradients stay in the chunks' gradient buffers, reduced as megatron-core does when
    its finalize function is set. Virtual pipelining takes a multiple of the pipeline size: the last pack is run again
    to fill up, its loss times zero (the router's auxiliary loss still counts it).
    """
    rounds_of = model.groups.pipeline.size() if len(model.chunks) > 1 else 1
    packs = [*inputs, *[inputs[-1]] * (-len(inputs) % rounds_of)]
    count = len(packs)

    def step(data: Iterator[tuple[int, ModelInput]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        index, item = next(data)
        filler = index >= len(inputs)
        with contextlib.nullcontext() if filler else record(index, chunk, item.num_tokens):
            output = chunk(item.input_ids_1P, item.position_ids_1P, None, packed_seq_params=item.attention)

        def finish(logits_1PV: torch.Tensor, non_loss_data: bool = False) -> Any:
            if filler:
                return None if non_loss_data else ((logits_1PV * 0.0).sum(), None)
            loss, kept = head(index, logits_1PV[0, : item.num_tokens])
            if non_loss_data:
                return kept
            assert loss is not None, "a backward pass needs a loss"
            return loss * count, kept

        return output, finish

    longest = max(item.input_ids_1P.shape[1] for item in packs)
    iterators = [iter(list(enumerate(packs))) for _ in model.chunks]
    with contextlib.nullcontext() if backward else torch.no_grad():
        kept: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=count,
            seq_length=longest,
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
        )
    return kept[: len(inputs)]


def mask_padded_vocab(model: Model, logits_TV: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits with the padding columns of this rank's slice at the dtype's minimum, and the slice's first token."""
    width = logits_TV.shape[-1]
    start = model.groups.tensor.rank() * width
    valid = min(max(model.architecture.vocab_size - start, 0), width)
    if valid < width:
        column = torch.arange(width, device=logits_TV.device)
        logits_TV = logits_TV.masked_fill(column >= valid, torch.finfo(logits_TV.dtype).min)
    return logits_TV, start


def token_log_probs(
    model: Model, logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs [T] (nats, fp32) of the targets at `temperature`, over the whole vocabulary; differentiable."""
    logits_TV, start = mask_padded_vocab(model, logits_TV)
    return vocab_parallel_log_probs(
        logits_TV, targets_T, temperature=temperature, vocab_start=start, group=model.groups.tensor
    )


def first_choice(model: Model, logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Whether each target is the likeliest token of the whole vocabulary, bool [T]."""
    logits_TV, start = mask_padded_vocab(model, logits_TV)
    return vocab_parallel_first_choice(logits_TV, targets_T, vocab_start=start, group=model.groups.tensor)
