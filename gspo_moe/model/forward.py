"""Runs packs through megatron-core's pipeline schedule: the one way in which every forward and backward happens.

Training, scoring, evaluation and generation all come through `run`, so they share packing, padding and vocabulary
handling. Shape letters: T tokens of a pack, P tokens with padding, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from gspo_moe.model.build import Model, unwrap
from gspo_moe.model.inputs import ModelInput, PaddedInput, pad_inputs
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.vocab import vocab_parallel_first_choice, vocab_parallel_log_probs


class Head(Protocol):
    """What the last stage makes of a pack's logits [T, V]: a loss to differentiate (or None) and anything to keep.

    Under context parallelism T is this rank's part of the pack.
    """

    def __call__(self, index: int, logits_TV: torch.Tensor, /) -> tuple[torch.Tensor | None, Any]: ...


RecordScope = Callable[[int, torch.nn.Module, ContextSplit], contextlib.AbstractContextManager[None]]


def no_recording(index: int, chunk: torch.nn.Module, split: ContextSplit) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


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
    its finalize function is set. Every data-parallel rank calls it with equally many packs; a pack may be empty.
    Context-parallel ranks call it with the same packs, each for its own tokens (`ModelInput.split`).
    Virtual pipelining takes a multiple of the pipeline size: a pass without backward is filled up with the last pack.
    """
    fillers = -len(inputs) % model.groups.pipeline.size() if len(model.chunks) > 1 else 0
    assert not (backward and fillers), "the router's auxiliary loss would count the fillers"
    padded = pad_inputs(model, inputs)
    packs = [*padded, *[padded[-1]] * fillers]
    count = len(packs)

    def step(data: Iterator[tuple[int, PaddedInput]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        index, item = next(data)
        filler = index >= len(inputs)
        with contextlib.nullcontext() if filler else record(index, chunk, item.split):
            output = chunk(
                item.input_ids_1P,
                item.position_ids_1P,
                None,
                packed_seq_params=item.attention,
                padding_mask=_stage_mask(model, chunk, item.padding_mask),
            )

        def finish(logits_1PV: torch.Tensor, non_loss_data: bool = False) -> Any:
            if filler:
                return None
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
            seq_length=longest * model.groups.layout.context,  # which megatron-core divides by
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
        )
    return kept[: len(inputs)]


def _stage_mask(model: Model, chunk: torch.nn.Module, mask_1P: torch.Tensor | None) -> torch.Tensor | None:
    """The padding mask as GPTModel wants it: it scatters the mask along the sequence on the first stage alone."""
    if mask_1P is None or not model.config.sequence_parallel or unwrap(chunk).pre_process:
        return mask_1P
    return mask_1P.chunk(model.groups.tensor.size(), dim=1)[model.groups.tensor.rank()]


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
