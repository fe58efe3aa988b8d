"""Token log-probs from hidden states: output layer and softmax together, over a block of words at a time.

The logits of the whole vocabulary never exist: forward takes block after block, as if each were a tensor-parallel
rank's, backward computes each block's logits again, except those that fit the memory budget, which are kept. Where they
all fit, nothing is computed twice. Blocks of words rather than of tokens read and write each row of the weight and of
its gradient once, and keep the products large.

Shape letters: T tokens, H hidden, V this rank's rows of the output weight, B of them in a block (`kernels.blocks`), P
tokens of hidden states, T and padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.library import custom_op

from gspo_moe.errors import KernelError
from gspo_moe.kernels.blocks import MEMORY_BUDGET, BlockLogits, block_columns, product_bytes_of, wanted_columns
from gspo_moe.kernels.collectives import all_gather_single, reduce_scatter_single
from gspo_moe.kernels.ops import token_backward_, token_stats, wide
from gspo_moe.kernels.products import add_product_
from gspo_moe.kernels.tokens import (
    TokenLogProbs,
    check,
    combine,
    group_name,
    merge,
    named_group,
    refuse_second_order,
)


@dataclass(frozen=True)
class VocabShard:
    """What this rank has of an output layer that is split by words over `group`.

    start: token of its first row. vocab: rows that are tokens, None for all; later ones are padding.
    sequence_parallel: each rank of `group` has an equal part of the hidden states' rows, else all of them.
    """

    start: int = 0
    vocab: int | None = None
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False


def _gathered(hidden: torch.Tensor, group: str, sequence_parallel: bool) -> torch.Tensor:
    """All tokens' hidden states [P, H], of which a rank holds an equal part under sequence parallelism."""
    ranks = named_group(group)
    if ranks is None or not sequence_parallel:
        return hidden
    whole = hidden.new_empty((ranks.size() * len(hidden), hidden.shape[1]))
    all_gather_single(whole, hidden.contiguous(), group=ranks)
    return whole


def _rows(whole: torch.Tensor, positions: torch.Tensor | None, count: int) -> torch.Tensor:
    """The targets' hidden states [T, H]."""
    return whole[:count] if positions is None else whole.index_select(0, positions)


@custom_op("gspo_moe::linear_token_log_probs", mutates_args=())
def _linear_token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    group: str,
    sequence_parallel: bool,
    block: int,
    kept: int,
    into_main_grad: bool,
    entropy: bool,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    whole = _gathered(hidden, group, sequence_parallel)
    kept_logits = whole.new_empty(kept * len(targets))
    logits = BlockLogits(_rows(whole, positions, len(targets)), weight, kept_logits, block)
    parts = whole.new_empty((len(logits.blocks), len(targets), 4 if entropy else 3), dtype=wide(whole.dtype))
    for part, columns in zip(parts, logits.blocks, strict=True):
        start, words = logits.words(columns, vocab_start, vocab)
        part.copy_(token_stats(logits.compute(columns), targets, inverse_temperature, start, words, entropy))
    return *combine(merge(parts), group), kept_logits


@_linear_token_log_probs.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    group: str,
    sequence_parallel: bool,
    block: int,
    kept: int,
    into_main_grad: bool,
    entropy: bool,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    figures = hidden.new_empty(targets.shape[0], dtype=wide(hidden.dtype))
    spread = figures.new_empty(targets.shape[0] if entropy else 0)
    return figures, torch.empty_like(figures), spread, figures > 0, hidden.new_empty(kept * targets.shape[0])


@custom_op("gspo_moe::linear_token_backward_", mutates_args=("kept_logits", "main_grad"))
def _linear_token_backward_(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None,
    log_z: torch.Tensor,
    grad_log_probs: torch.Tensor,
    kept_logits: torch.Tensor,
    main_grad: torch.Tensor | None,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    group: str,
    sequence_parallel: bool,
    block: int,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, reduced over the group, and of the weight, which is empty where main_grad took it."""
    whole = _gathered(hidden, group, sequence_parallel)
    num_tokens = len(targets)
    hidden_TH = _rows(whole, positions, num_tokens)
    grad_hidden = torch.zeros_like(whole if positions is None else hidden_TH, dtype=wide(whole.dtype))
    grad_weight = weight.new_empty((len(weight) if needs_weight and main_grad is None else 0, weight.shape[1]))
    logits = BlockLogits(hidden_TH, weight, kept_logits, block)
    narrow = grad_hidden.dtype != whole.dtype and not whole.is_cuda
    product = whole.new_empty(max(num_tokens, block if main_grad is not None else 0) * whole.shape[1] * narrow)
    for columns in logits.blocks:
        gradient_TB = logits.place(columns) if logits.kept(columns) else logits.compute(columns)
        numbers = (inverse_temperature, *logits.words(columns, vocab_start, vocab))
        token_backward_(gradient_TB, targets, log_z, grad_log_probs, None, None, *numbers)
        add_product_(grad_hidden[:num_tokens], gradient_TB, weight[columns], product)
        if main_grad is not None:
            add_product_(main_grad[columns], gradient_TB.T, hidden_TH, product)
        elif needs_weight:
            torch.mm(gradient_TB.T, hidden_TH, out=grad_weight[columns])
        del gradient_TB  # or the next block would be made beside it
    grad_hidden = grad_hidden.to(whole.dtype)
    if positions is not None:
        grad_hidden = torch.zeros_like(whole).index_copy_(0, positions, grad_hidden)
    return _reduced(grad_hidden, group, sequence_parallel), grad_weight


@_linear_token_backward_.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None,
    log_z: torch.Tensor,
    grad_log_probs: torch.Tensor,
    kept_logits: torch.Tensor,
    main_grad: torch.Tensor | None,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    group: str,
    sequence_parallel: bool,
    block: int,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = weight.shape[0] if needs_weight and main_grad is None else 0
    return torch.empty_like(hidden), weight.new_empty((rows, weight.shape[1]))


def _reduced(grad_hidden: torch.Tensor, group: str, sequence_parallel: bool) -> torch.Tensor:
    """The sum of every rank's part, which came from its own words; of this rank's tokens under sequence parallelism."""
    ranks = named_group(group)
    if ranks is None:
        return grad_hidden
    if not sequence_parallel:
        dist.all_reduce(grad_hidden, group=ranks)
        return grad_hidden
    mine = grad_hidden.new_empty((len(grad_hidden) // ranks.size(), grad_hidden.shape[1]))
    reduce_scatter_single(mine, grad_hidden, group=ranks)
    return mine


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, *ctx.numbers, ctx.block, _, into_main_grad, _, positions = inputs
    _, log_z, entropy, first_choice, kept = output
    ctx.mark_non_differentiable(log_z, entropy, first_choice, kept)
    ctx.set_materialize_grads(False)  # or backward would be handed zeros as large as the kept logits
    ctx.save_for_backward(hidden, weight, targets, positions, log_z, kept)
    ctx.parameter = weight if into_main_grad else None


def _backward(ctx: Any, grad_T: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second_order()
    try:
        hidden, weight, targets, positions, log_z, kept = ctx.saved_tensors
    except RuntimeError as error:
        raise KernelError(
            "hidden states or weight were changed before the backward of linear_token_log_probs, or it ran twice, and "
            "the first time had turned the kept logits into their gradient; call linear_token_log_probs again"
        ) from error
    if type(kept) is not torch.Tensor:  # torch.compile is tracing, which cannot have a forward's output used up
        kept = kept.clone()
    main_grad = None if ctx.parameter is None else ctx.parameter.main_grad
    needs_weight = ctx.needs_input_grad[1]
    grad_hidden, grad_weight = _linear_token_backward_(
        hidden, weight, targets, positions, log_z, grad_T, kept, main_grad, *ctx.numbers, ctx.block, needs_weight
    )
    taken = main_grad is not None or not needs_weight
    return grad_hidden, None if taken else grad_weight, *[None] * 11


_linear_token_log_probs.register_autograd(_backward, setup_context=_remember)


def linear_token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    shard: VocabShard = VocabShard(),
    positions: torch.Tensor | None = None,
    entropy: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    into_main_grad: bool = False,
) -> TokenLogProbs:
    """`token_log_probs` of the logits hidden @ weight^T, without all of them where they exceed `memory_budget` bytes.

    The budget bounds the logits that exist at a time and a block's weight gradient on its way to main_grad; the
    gradient of `hidden` comes on top, in float32 on the CPU with 1024 rows of what is added to it.

    hidden: [P, H], the same on every rank of the shard's group, or, if `sequence_parallel`, this rank's equal part of
    the rows. weight: [V, H] of the same dtype, this rank's rows of the output layer. targets: int64 [T], of the first T
    of all tokens, or of the T different ones that `positions` names (int64 [T]); the others get gradient 0.
    temperature: as in `token_log_probs`.
    entropy: asks for the entropy too, from the same pass; it has no gradient.
    The gradient of `hidden` is summed over blocks in float32, and over the group; that of `weight` is one product a
    row, given back in the weight's dtype or, with `into_main_grad`, added to `weight.main_grad`, autograd then seeing
    none (megatron-core must not overlap gradient reduction).
    Raises KernelError for arguments that do not fit.
    """
    vocab = len(weight) if shard.vocab is None else shard.vocab
    _check(hidden, weight, targets, shard, vocab)
    _check_positions(positions, targets)
    if into_main_grad and not hasattr(weight, "main_grad"):
        raise KernelError("weight has no main_grad; wrap the model in megatron-core's DistributedDataParallel first")
    check(weight.new_empty((len(targets), 0)), targets, temperature)
    differentiates = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    block, kept = block_columns(
        len(weight),
        max(len(targets), 1) * weight.element_size(),
        product_bytes_of(weight, into_main_grad) if differentiates else 0,
        memory_budget,
        wanted_columns(weight, len(targets)),
    )
    log_probs_T, _, entropy_T, first_choice_T, _ = _linear_token_log_probs(
        hidden,
        weight,
        targets.contiguous(),
        1.0 / temperature,
        shard.start,
        vocab,
        group_name(shard.group),
        shard.sequence_parallel,
        block,
        kept if differentiates else 0,
        into_main_grad,
        entropy,
        positions,
    )
    return TokenLogProbs(log_probs_T, entropy_T if entropy else None, first_choice_T)


def _check_positions(positions: torch.Tensor | None, targets: torch.Tensor) -> None:
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != targets.shape):
        raise KernelError(
            f"positions must be int64 {list(targets.shape)}, one a target, got {positions.dtype} "
            f"{list(positions.shape)}"
        )


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shard: VocabShard, vocab: int) -> None:
    ranks = shard.group.size() if shard.group is not None and shard.sequence_parallel else 1
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise KernelError(
            f"hidden must be [P, H] and weight [V, H] of one dtype, got {hidden.dtype} {list(hidden.shape)} "
            f"and {weight.dtype} {list(weight.shape)}"
        )
    if targets.ndim != 1 or len(targets) > len(hidden) * ranks:
        raise KernelError(f"{list(targets.shape)} targets do not fit {len(hidden) * ranks} rows of hidden states")
    if not 0 <= vocab <= len(weight):
        raise KernelError(f"vocab={vocab} must be from 0 to the {len(weight)} rows of weight")
