"""Token log-probs from hidden states: output layer and softmax together, over a few tokens at a time.

The logits of all tokens never exist: forward takes chunk after chunk, backward computes each chunk's logits again,
except those that fit the memory budget, which are kept. Where they all fit, nothing is computed twice.

Shape letters: T tokens, H hidden, V this rank's rows of the output weight, P tokens of hidden states, T and padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.library import custom_op

from gspo_moe.errors import KernelError
from gspo_moe.kernels.ops import token_backward_, token_stats, wide
from gspo_moe.kernels.tokens import TokenLogProbs, check, combine, group_name, named_group, refuse_second_order

MEMORY_BUDGET = 512 * 2**20
CHUNKS = 4  # of the budget: one being computed, the others kept


def chunk_tokens(num_tokens: int, row_bytes: int, memory_budget: int) -> tuple[int, int]:
    """Tokens a chunk, and tokens of the first chunks whose logits are kept for the backward, within the budget.

    At least one token a chunk, whatever the budget.
    """
    if num_tokens * row_bytes <= memory_budget:
        return max(num_tokens, 1), num_tokens
    chunk = max(memory_budget // (CHUNKS * row_bytes), 1)
    kept = max(memory_budget // row_bytes - chunk, 0) // chunk * chunk
    return chunk, min(kept, num_tokens)


def _chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk))


class _Logits:
    """The logits of one chunk after the other: the kept ones in place, the others in one buffer."""

    def __init__(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, kept_KV: torch.Tensor, chunk: int) -> None:
        self._hidden_TH, self._weight_VH, self._kept_KV, self._chunk = hidden_TH, weight_VH, kept_KV, chunk
        self._buffer: torch.Tensor | None = None

    def kept(self, rows: slice) -> bool:
        return rows.stop <= len(self._kept_KV)

    def place(self, rows: slice) -> torch.Tensor:
        if self.kept(rows):
            return self._kept_KV[rows]
        if self._buffer is None:
            self._buffer = self._kept_KV.new_empty((self._chunk, len(self._weight_VH)))
        return self._buffer[: rows.stop - rows.start]

    def compute(self, rows: slice) -> torch.Tensor:
        return torch.mm(self._hidden_TH[rows], self._weight_VH.T, out=self.place(rows))


def _gathered(hidden: torch.Tensor, group: str, sequence_parallel: bool) -> torch.Tensor:
    """All tokens' hidden states [P, H], of which a rank holds an equal part under sequence parallelism."""
    ranks = named_group(group)
    if ranks is None or not sequence_parallel:
        return hidden
    whole = hidden.new_empty((ranks.size() * len(hidden), hidden.shape[1]))
    dist.all_gather_single(whole, hidden.contiguous(), group=ranks)
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
    chunk: int,
    kept: int,
    into_main_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    whole = _gathered(hidden, group, sequence_parallel)
    kept_KV = whole.new_empty((kept, len(weight)))
    stats_TS = whole.new_empty((len(targets), 3), dtype=wide(whole.dtype))
    logits = _Logits(whole, weight, kept_KV, chunk)
    for rows in _chunks(len(targets), chunk):
        stats_TS[rows] = token_stats(
            logits.compute(rows), targets[rows], inverse_temperature, vocab_start, vocab, False
        )
    log_probs, log_z, _, first_choice = combine(stats_TS, group)
    return log_probs, log_z, first_choice, kept_KV


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
    chunk: int,
    kept: int,
    into_main_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    figures = hidden.new_empty(targets.shape[0], dtype=wide(hidden.dtype))
    return figures, torch.empty_like(figures), figures > 0, hidden.new_empty((kept, weight.shape[0]))


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
    chunk: int,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, reduced over the group, and of the weight, which is empty where main_grad took it."""
    whole = _gathered(hidden, group, sequence_parallel)
    chunks = list(_chunks(len(targets), chunk))
    grad_hidden = torch.empty_like(whole)
    grad_hidden[len(targets) :] = 0
    total = main_grad
    if total is None and needs_weight:
        # One chunk's product is rounded once, by itself.
        total = torch.zeros_like(weight, dtype=weight.dtype if len(chunks) == 1 else wide(weight.dtype))
    logits = _Logits(whole, weight, kept_logits, chunk)
    for rows in chunks:
        gradient = logits.place(rows) if logits.kept(rows) else logits.compute(rows)
        numbers = (inverse_temperature, vocab_start, vocab)
        token_backward_(gradient, targets[rows], log_z[rows], grad_log_probs[rows], None, None, *numbers)
        torch.mm(gradient, weight, out=grad_hidden[rows])
        if total is not None:
            _add_product(total, gradient, whole[rows])
    if main_grad is not None or total is None:
        total = weight.new_empty((0, weight.shape[1]))
    return _reduced(grad_hidden, group, sequence_parallel), total.to(weight.dtype)


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
    chunk: int,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = weight.shape[0] if needs_weight and main_grad is None else 0
    return torch.empty_like(hidden), weight.new_empty((rows, weight.shape[1]))


def _add_product(total_VH: torch.Tensor, gradient_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """total += gradient^T hidden. 16-bit factors of a float32 total: blocks of rows, so that no second total exists."""
    if total_VH.dtype == gradient_CV.dtype:
        total_VH.addmm_(gradient_CV.T, hidden_CH)
        return
    rows = max(gradient_CV.numel() // max(hidden_CH.shape[1], 1), 1)  # a block's product is no larger than the gradient
    for start in range(0, len(total_VH), rows):
        block_VC = gradient_CV[:, start : start + rows].T
        if total_VH.is_cuda:
            product = torch.mm(block_VC, hidden_CH, out_dtype=total_VH.dtype)
        else:  # torch's CPU product of 16-bit factors is summed in float32 and rounded, here once a chunk
            product = torch.mm(block_VC, hidden_CH)
        total_VH[start : start + rows] += product


def _reduced(grad_hidden: torch.Tensor, group: str, sequence_parallel: bool) -> torch.Tensor:
    """The sum of every rank's part, which came from its own words; of this rank's tokens under sequence parallelism."""
    ranks = named_group(group)
    if ranks is None:
        return grad_hidden
    if not sequence_parallel:
        dist.all_reduce(grad_hidden, group=ranks)
        return grad_hidden
    mine = grad_hidden.new_empty((len(grad_hidden) // ranks.size(), grad_hidden.shape[1]))
    dist.reduce_scatter_single(mine, grad_hidden, group=ranks)
    return mine


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, *ctx.numbers, ctx.chunk, _, into_main_grad = inputs
    _, log_z, first_choice, kept = output
    ctx.mark_non_differentiable(log_z, first_choice, kept)
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
        hidden, weight, targets, log_z, grad_T, kept, main_grad, *ctx.numbers, ctx.chunk, needs_weight
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
    """`token_log_probs` of the logits hidden @ weight^T, which need at most `memory_budget` bytes at a time.

    hidden: [P, H], the same on every rank of `group`, or, with `sequence_parallel`, this rank's equal part of the rows.
    weight: [V, H] of the same dtype, this rank's rows of the output layer. targets: int64 [T], of the first T of all
    tokens; those behind are padding, with gradient 0. temperature, vocab_start, vocab, group: as in `token_log_probs`.
    The gradient of `hidden` is summed over the group; that of `weight` is summed over chunks in float32 and given back
    in the weight's dtype, or, with `into_main_grad`, added to `weight.main_grad` as it is computed, autograd then
    seeing none (megatron-core must not overlap gradient reduction). No entropy.
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
    chunk, kept = chunk_tokens(len(targets), len(weight) * weight.element_size(), memory_budget)
    differentiates = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    log_probs_T, _, first_choice_T, _ = _linear_token_log_probs(
        hidden,
        weight,
        targets.contiguous(),
        1.0 / temperature,
        vocab_start,
        vocab,
        group_name(group),
        sequence_parallel,
        chunk,
        kept if differentiates else 0,
        into_main_grad,
    )
    return TokenLogProbs(log_probs_T, None, first_choice_T)
