"""Token log-probs from hidden states: output layer and softmax together, over a block of words at a time.

The logits of the whole vocabulary never exist: forward takes block after block, as if each were a tensor-parallel
rank's, backward computes each block's logits again, except those that fit the memory budget, which are kept. Where they
all fit, nothing is computed twice. Blocks of words rather than of tokens read and write each row of the weight and of
its gradient once, and keep the products large.

Shape letters: T tokens, H hidden, V this rank's rows of the output weight, B of them in a block, P tokens of hidden
states, T and padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.library import custom_op

from gspo_moe.errors import KernelError
from gspo_moe.kernels.collectives import all_gather_single, reduce_scatter_single
from gspo_moe.kernels.ops import token_backward_, token_stats, wide
from gspo_moe.kernels.products import add_product_, onednn_mm, suits_onednn
from gspo_moe.kernels.tokens import (
    TokenLogProbs,
    check,
    combine,
    group_name,
    merge,
    named_group,
    refuse_second_order,
)

MEMORY_BUDGET = 512 * 2**20
BLOCKS = 16  # of the budget: one being computed, the others kept
# What up to a quarter of the budget is spent on: on CUDA columns, as each block costs a pass over the hidden gradient;
# on the CPU bytes from which on glibc maps a result's memory, where freed smaller ones may fragment its heap.
WIDE = 4096
MAPPED = 2**25
EVEN = 64  # columns: products over odd numbers of them are up to a third slower


def block_columns(
    columns: int, logit_bytes: int, product_bytes: int, memory_budget: int, wide: int = 1
) -> tuple[int, int]:
    """Columns of logits a block, and columns of the first blocks that are kept for the backward, within the budget.

    logit_bytes: of a column's logits; product_bytes: of its row of the block's weight gradient, 0 where that goes
    straight to its place. wide: columns that a block should have. At least one, whatever the budget.
    """
    affordable = memory_budget // (logit_bytes + product_bytes)
    block = max(min(max(affordable // BLOCKS, min(affordable // 4, wide)), columns), 1)
    if block < columns:
        block = block // EVEN * EVEN or block
    for_logits = memory_budget - block * product_bytes
    if columns * logit_bytes <= for_logits:
        return block, columns
    return block, max(for_logits // logit_bytes - block, 0) // block * block


def _product_bytes(weight_VH: torch.Tensor, into_main_grad: bool) -> int:
    """Bytes of a word's gradient before it is added to main_grad, see `add_product_`."""
    if not into_main_grad or weight_VH.dtype == wide(weight_VH.dtype):
        return 0
    itemsize = wide(weight_VH.dtype).itemsize if weight_VH.is_cuda else weight_VH.element_size()
    return weight_VH.shape[1] * itemsize


def _wanted_columns(weight_VH: torch.Tensor, num_tokens: int) -> int:
    """Columns a block should have, see `block_columns`."""
    if weight_VH.is_cuda:
        return WIDE
    return MAPPED // (4 * max(num_tokens, 1)) + EVEN if weight_VH.dtype == torch.float32 else 1


class _Logits:
    """The logits [T, B] of one block after the other: the kept ones in their own memory, the others in one buffer.

    oneDNN's results come in new memory, which is the block where it is not kept.
    """

    def __init__(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, kept: torch.Tensor, block: int) -> None:
        self._hidden_TH, self._weight_VH, self._kept = hidden_TH, weight_VH, kept
        self._num_tokens, self._num_kept = len(hidden_TH), kept.numel() // max(len(hidden_TH), 1)
        self.blocks = [slice(start, min(start + block, len(weight_VH))) for start in range(0, len(weight_VH), block)]
        self._onednn = suits_onednn(hidden_TH, weight_VH[:block].T)
        buffered = block if self._num_kept < len(weight_VH) and not self._onednn else 0
        self._buffer = kept.new_empty(self._num_tokens * buffered)

    def words(self, columns: slice, vocab_start: int, vocab: int) -> tuple[int, int]:
        """First token and number of tokens of a block, the rest of which is padding."""
        return vocab_start + columns.start, min(max(vocab - columns.start, 0), columns.stop - columns.start)

    def kept(self, columns: slice) -> bool:
        return columns.stop <= self._num_kept

    def place(self, columns: slice) -> torch.Tensor:
        width = columns.stop - columns.start
        start = columns.start * self._num_tokens if self.kept(columns) else 0
        memory = self._kept if self.kept(columns) else self._buffer
        return memory[start : start + width * self._num_tokens].view(self._num_tokens, width)

    def compute(self, columns: slice) -> torch.Tensor:
        factors = self._hidden_TH, self._weight_VH[columns].T
        if not self._onednn:
            return torch.mm(*factors, out=self.place(columns))
        found = onednn_mm(*factors)
        return self.place(columns).copy_(found) if self.kept(columns) else found


def _gathered(hidden: torch.Tensor, group: str, sequence_parallel: bool) -> torch.Tensor:
    """All tokens' hidden states [P, H], of which a rank holds an equal part under sequence parallelism."""
    ranks = named_group(group)
    if ranks is None or not sequence_parallel:
        return hidden
    whole = hidden.new_empty((ranks.size() * len(hidden), hidden.shape[1]))
    all_gather_single(whole, hidden.contiguous(), group=ranks)
    return whole


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    whole = _gathered(hidden, group, sequence_parallel)
    kept_logits = whole.new_empty(kept * len(targets))
    logits = _Logits(whole[: len(targets)], weight, kept_logits, block)
    parts = whole.new_empty((len(logits.blocks), len(targets), 3), dtype=wide(whole.dtype))
    for part, columns in zip(parts, logits.blocks, strict=True):
        start, words = logits.words(columns, vocab_start, vocab)
        part.copy_(token_stats(logits.compute(columns), targets, inverse_temperature, start, words, False))
    log_probs, log_z, _, first_choice = combine(merge(parts), group)
    return log_probs, log_z, first_choice, kept_logits


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    figures = hidden.new_empty(targets.shape[0], dtype=wide(hidden.dtype))
    return figures, torch.empty_like(figures), figures > 0, hidden.new_empty(kept * targets.shape[0])


@custom_op("gspo_moe::linear_token_backward_", mutates_args=("kept_logits", "main_grad"))
def _linear_token_backward_(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
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
    hidden_TH = whole[:num_tokens]
    grad_hidden = torch.zeros_like(whole, dtype=wide(whole.dtype))
    grad_weight = weight.new_empty((len(weight) if needs_weight and main_grad is None else 0, weight.shape[1]))
    logits = _Logits(hidden_TH, weight, kept_logits, block)
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
    return _reduced(grad_hidden.to(whole.dtype), group, sequence_parallel), grad_weight


@_linear_token_backward_.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
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
    hidden, weight, targets, *ctx.numbers, ctx.block, _, into_main_grad = inputs
    _, log_z, first_choice, kept = output
    ctx.mark_non_differentiable(log_z, first_choice, kept)
    ctx.set_materialize_grads(False)  # or backward would be handed zeros as large as the kept logits
    ctx.save_for_backward(hidden, weight, targets, log_z, kept)
    ctx.parameter = weight if into_main_grad else None


def _backward(ctx: Any, grad_T: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second_order()
    try:
        hidden, weight, targets, log_z, kept = ctx.saved_tensors
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
        hidden, weight, targets, log_z, grad_T, kept, main_grad, *ctx.numbers, ctx.block, needs_weight
    )
    taken = main_grad is not None or not needs_weight
    return grad_hidden, None if taken else grad_weight, *[None] * 9


_linear_token_log_probs.register_autograd(_backward, setup_context=_remember)


def linear_token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    into_main_grad: bool = False,
) -> TokenLogProbs:
    """`token_log_probs` of the logits hidden @ weight^T, without all of them where they exceed `memory_budget` bytes.

    The budget bounds the logits that exist at a time and a block's weight gradient on its way to main_grad; the
    gradient of `hidden` comes on top, in float32 on the CPU with 1024 rows of what is added to it.

    hidden: [P, H], the same on every rank of `group`, or, with `sequence_parallel`, this rank's equal part of the rows.
    weight: [V, H] of the same dtype, this rank's rows of the output layer. targets: int64 [T], of the first T of all
    tokens; those behind are padding, with gradient 0. temperature, vocab_start, vocab, group: as in `token_log_probs`.
    The gradient of `hidden` is summed over blocks in float32, and over the group; that of `weight` is one product a
    row, given back in the weight's dtype or, with `into_main_grad`, added to `weight.main_grad`, autograd then seeing
    none (megatron-core must not overlap gradient reduction). No entropy.
    Raises KernelError for arguments that do not fit.
    """
    ranks = group.size() if group is not None and sequence_parallel else 1
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise KernelError(
            f"hidden must be [P, H] and weight [V, H] of one dtype, got {hidden.dtype} {list(hidden.shape)} "
            f"and {weight.dtype} {list(weight.shape)}"
        )
    if targets.ndim != 1 or len(targets) > len(hidden) * ranks:
        raise KernelError(f"{list(targets.shape)} targets do not fit {len(hidden) * ranks} rows of hidden states")
    vocab = len(weight) if vocab is None else vocab
    if not 0 <= vocab <= len(weight):
        raise KernelError(f"vocab={vocab} must be from 0 to the {len(weight)} rows of weight")
    if into_main_grad and not hasattr(weight, "main_grad"):
        raise KernelError("weight has no main_grad; wrap the model in megatron-core's DistributedDataParallel first")
    check(weight.new_empty((len(targets), 0)), targets, temperature)
    differentiates = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    block, kept = block_columns(
        len(weight),
        max(len(targets), 1) * weight.element_size(),
        _product_bytes(weight, into_main_grad) if differentiates else 0,
        memory_budget,
        _wanted_columns(weight, len(targets)),
    )
    log_probs_T, _, first_choice_T, _ = _linear_token_log_probs(
        hidden,
        weight,
        targets.contiguous(),
        1.0 / temperature,
        vocab_start,
        vocab,
        group_name(group),
        sequence_parallel,
        block,
        kept if differentiates else 0,
        into_main_grad,
    )
    return TokenLogProbs(log_probs_T, None, first_choice_T)
