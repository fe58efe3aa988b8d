"""Runs packs through megatron-core's pipeline schedule: the one way in which every forward and backward happens.

Training, scoring, evaluation and generation all come through `run`, so they share packing, padding and vocabulary
handling. Shape letters: T tokens of a pack, P tokens with padding, N chosen positions of them, H hidden, V this rank's
slice of the vocabulary, X what the last stage gives of each token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from gspo_moe.kernels import TokenLogProbs, linear_token_log_probs
from gspo_moe.model.build import Model, unwrap
from gspo_moe.model.inputs import ModelInput, PaddedInput, pad_inputs
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.vocab import vocab_parallel_first_choice, vocab_parallel_log_probs
from gspo_moe.platform import deterministic_algorithms


class Head(Protocol):
    """What the last stage makes of a pack's logits [T, V]: a loss to differentiate (or None) and anything to keep.

    Under context parallelism T is this rank's part of the pack; under `run(positions=...)` it is those positions.
    Under `run(for_log_probs=True)` it gets, instead of logits, what `token_log_probs` takes, and nothing else can read.
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
    for_log_probs: bool = False,
    positions: Sequence[torch.Tensor] | None = None,
) -> list[Any]:
    """Runs every pack forward (and backward) through the pipeline; what `head` kept, in order, on the last stage.

    Other stages get an empty list. The loss that `head` returns is summed over packs: megatron-core's division by the
    number of packs is undone here. Gradients stay in the chunks' gradient buffers, reduced as megatron-core does when
    its finalize function is set. Every data-parallel rank calls it with equally many packs; a pack may be empty.
    Context-parallel ranks call it with the same packs, each for its own tokens (`ModelInput.split`).
    Virtual pipelining takes a multiple of the pipeline size: a pass without backward is filled up with the last pack.
    positions: int64 [N] a pack: their logits [N, V] alone are made, in a pass without backward. Default: all tokens'.
    """
    fillers = -len(inputs) % model.groups.pipeline.size() if len(model.chunks) > 1 else 0
    assert not (backward and fillers), "the router's auxiliary loss would count the fillers"
    padded = pad_inputs(model, inputs)
    packs = [*padded, *[padded[-1]] * fillers]
    count = len(packs)
    hidden = for_log_probs and model.fused_log_probs
    assert positions is None or not (backward or for_log_probs), "chosen positions are for generation"

    def step(data: Iterator[tuple[int, PaddedInput]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        index, item = next(data)
        filler = index >= len(inputs)
        recording = contextlib.nullcontext() if filler else record(index, chunk, item.split)
        chosen = None if positions is None else positions[min(index, len(inputs) - 1)]
        with recording, _no_output_layer(chunk) if hidden else _only_positions(chunk, chosen):
            output = _output(model, chunk, item)

        def finish(output_1PX: torch.Tensor, non_loss_data: bool = False) -> Any:
            if filler:
                return None
            loss, kept = head(index, output_1PX[0] if hidden or positions else output_1PX[0, : item.num_tokens])
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


def _words(model: Model, width: int) -> tuple[int, int]:
    """The first token of this tensor rank's `width` columns, and how many of them are tokens, the rest padding."""
    start = model.groups.tensor.rank() * width
    return start, min(max(model.vocab - start, 0), width)


@contextlib.contextmanager
def _no_output_layer(chunk: torch.nn.Module) -> Iterator[None]:
    """Has the last stage give its hidden states [1, P, H], under sequence parallelism this rank's part of them."""
    gpt = unwrap(chunk)
    if not gpt.post_process:
        yield
        return
    gpt.output_layer.forward = lambda hidden, **_: (hidden, None)
    try:
        yield
    finally:
        del gpt.output_layer.forward


@contextlib.contextmanager
def _only_positions(chunk: torch.nn.Module, positions_N: torch.Tensor | None) -> Iterator[None]:
    """Has the last stage make the logits [1, N, V] of these positions alone, None for all. Forward only."""
    gpt = unwrap(chunk)
    if positions_N is None or not gpt.post_process:
        yield
        return
    layer = gpt.output_layer
    sequence_parallel = layer.sequence_parallel

    def forward(hidden_P1H: torch.Tensor, **more: Any) -> Any:
        if sequence_parallel:
            hidden_P1H = gather_from_sequence_parallel_region(hidden_P1H, group=layer.tp_group)
        return type(layer).forward(layer, hidden_P1H[positions_N], **more)

    layer.forward, layer.sequence_parallel = forward, False  # or it would gather the chosen ones once more
    try:
        yield
    finally:
        del layer.forward
        layer.sequence_parallel = sequence_parallel


def token_log_probs(
    model: Model, output_TX: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0
) -> TokenLogProbs:
    """Log-probs [T] (nats, fp32) of the targets at `temperature`, over the `vocab` of the model; differentiable.

    output_TX: what `run(for_log_probs=True)` gave the head.
    """
    tensor = model.groups.tensor
    if not model.fused_log_probs:
        start, vocab = _words(model, output_TX.shape[1])
        words_TV = output_TX[:, :vocab]
        log_probs_T = vocab_parallel_log_probs(
            words_TV, targets_T, temperature=temperature, vocab_start=start, group=tensor
        )
        first_choice_T = vocab_parallel_first_choice(words_TV, targets_T, vocab_start=start, group=tensor)
        return TokenLogProbs(log_probs_T, None, first_choice_T)
    gpt = model.gpt_chunks[-1]
    shared = gpt.share_embeddings_and_output_weights
    weight_VH = gpt.shared_embedding_or_output_weight() if shared else gpt.output_layer.weight
    start, vocab = _words(model, len(weight_VH))
    return linear_token_log_probs(
        output_TX.to(weight_VH.dtype),  # megatron-core's wrapper for bf16 hands the last stage's output on in fp32
        weight_VH,
        targets_T,
        temperature=temperature,
        vocab_start=start,
        vocab=vocab,
        group=tensor,
        sequence_parallel=model.config.sequence_parallel,
        memory_budget=model.log_prob_memory,
        into_main_grad=hasattr(weight_VH, "main_grad"),
    )


def token_values(model: Model, output_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The value head's V [T] (fp32) of the pack's `num_tokens` tokens, on every tensor rank; differentiable.

    output_PH: what `run(for_log_probs=True)` gave the head, of a model with `fused_log_probs`.
    """
    assert model.fused_log_probs, "logits are no hidden states"
    values_P = model.gpt_chunks[-1].value_head(output_PH)
    if model.config.sequence_parallel:
        # Every tensor rank goes on to the same loss: the gradient of a rank's own stretch is a slice, not a sum.
        values_P = gather_from_sequence_parallel_region(
            values_P, tensor_parallel_output_grad=False, group=model.groups.tensor
        )
    return values_P[:num_tokens]
