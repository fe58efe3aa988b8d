"""Runs packs through megatron-core's pipeline schedule: the one way in which every forward and backward happens.

Training, scoring, evaluation and generation all come through `run`, so they share packing, padding and, by what
`model.last_stage` makes of a pack, the output layer. Shape letters: P tokens of a pack with padding, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from gspo_moe.model.build import Model, unwrap
from gspo_moe.model.inputs import ModelInput, PaddedInput, pad_inputs
from gspo_moe.model.last_stage import LastStage
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.platform import deterministic_algorithms


class Head(Protocol):
    """What is made of a pack on the last stage: a loss to differentiate (or None) and anything to keep."""

    def __call__(self, index: int, stage: LastStage, /) -> tuple[torch.Tensor | None, Any]: ...


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
        recording = contextlib.nullcontext() if filler else record(index, chunk, item.split)
        with recording:
            output = _output(model, chunk, item)

        def finish(hidden_1PH: torch.Tensor, non_loss_data: bool = False) -> Any:
            if filler:
                return None
            loss, kept = head(index, LastStage(model, hidden_1PH[0], item.num_tokens))
            if non_loss_data:
                return kept
            assert loss is not None, "a backward pass needs a loss"
            return loss * count, kept

        return output, finish

    longest = max(item.input_ids_1P.shape[1] for item in packs)
    iterators = [iter(list(enumerate(packs))) for _ in model.chunks]
    with deterministic_algorithms(model.deterministic) if backward else torch.no_grad():
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


def _output(model: Model, chunk: torch.nn.Module, item: PaddedInput) -> torch.Tensor:
    mask = _stage_mask(model, chunk, item.padding_mask)
    ids, positions = item.input_ids_1P, item.position_ids_1P
    output: torch.Tensor = chunk(ids, positions, None, packed_seq_params=item.attention, padding_mask=mask)
    return output


def _stage_mask(model: Model, chunk: torch.nn.Module, mask_1P: torch.Tensor | None) -> torch.Tensor | None:
    """The padding mask as GPTModel wants it: it scatters the mask along the sequence on the first stage alone."""
    if mask_1P is None or not model.config.sequence_parallel or unwrap(chunk).pre_process:
        return mask_1P
    return mask_1P.chunk(model.groups.tensor.size(), dim=1)[model.groups.tensor.rank()]
