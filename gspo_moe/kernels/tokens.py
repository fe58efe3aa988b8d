"""Token log-probs, entropy and top-1 match from logits: one read forward, the logits their own gradient backward.

Shape letters: T tokens, V columns of this rank's logits, S statistics a token, P ranks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.library import custom_op

from gspo_moe.errors import KernelError
from gspo_moe.kernels.collectives import all_gather_single
from gspo_moe.kernels.ops import token_backward_, token_stats, wide

CHANGED = (
    "the logits of token_log_probs were changed before its backward, or it ran twice: a backward turns the logits into "
    "their gradient, and something else changed them or had turned them already; pass keep_logits=True"
)


@dataclass(frozen=True)
class TokenLogProbs:
    """What a pass over the vocabulary knows of each target.

    log_probs: [T] nats, float32 (float64 for float64 logits), differentiable. entropy: [T] nats of the whole
    distribution, None where not asked for; differentiable from `token_log_probs` alone. first_choice: bool [T], no
    token is likelier.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    first_choice: torch.Tensor


class Combined(NamedTuple):
    """log_z: log sum exp over the whole vocabulary, which the backward needs. entropy: empty where not asked for."""

    log_probs_T: torch.Tensor
    log_z_T: torch.Tensor
    entropy_T: torch.Tensor
    first_choice_T: torch.Tensor


def group_name(group: dist.ProcessGroup | None) -> str:
    """How an op's argument names a group; empty for none or one of a single rank."""
    return "" if group is None or group.size() == 1 else group.group_name


def named_group(name: str) -> dist.ProcessGroup | None:
    return _resolve_process_group(GroupName(name)) if name else None


def merge(parts_PTS: torch.Tensor) -> torch.Tensor:
    """Statistics [T, S] of a vocabulary from those of its parts."""
    max_PT, sum_PT, target_PT, *moment_PT = parts_PTS.unbind(dim=2)
    max_T = max_PT.amax(dim=0)
    shift_PT = torch.where(sum_PT == 0, 0.0, max_PT - max_T)  # a part of -inf alone adds nothing
    shrink_PT = shift_PT.exp()
    merged = [max_T, (sum_PT * shrink_PT).sum(dim=0), target_PT.amax(dim=0)]
    if moment_PT:
        merged.append(((moment_PT[0] + shift_PT * sum_PT) * shrink_PT).sum(dim=0))
    return torch.stack(merged, dim=1)


def combine(stats_TS: torch.Tensor, group: str) -> Combined:
    """The whole vocabulary's figures from each rank's statistics, in one collective; equal bits on every rank."""
    ranks = named_group(group)
    if ranks is not None:
        gathered = stats_TS.new_empty((ranks.size() * len(stats_TS), stats_TS.shape[1]))
        all_gather_single(gathered, stats_TS.contiguous(), group=ranks)
        stats_TS = merge(gathered.view(ranks.size(), *stats_TS.shape))
    max_T, sum_T, target_T, *moment_T = stats_TS.unbind(dim=1)
    log_sum_T = sum_T.log()
    entropy_T = log_sum_T - moment_T[0] / sum_T if moment_T else max_T.new_empty(0)
    # In this order, since adding two large numbers first would round.
    return Combined(target_T - max_T - log_sum_T, max_T + log_sum_T, entropy_T, target_T >= max_T)


@custom_op("gspo_moe::token_log_probs", mutates_args=())
def _token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    entropy: bool,
    keep_logits: bool,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(combine(token_stats(logits, targets, inverse_temperature, vocab_start, vocab, entropy), group))  # type: ignore[return-value]


@_token_log_probs.register_fake
def _(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    entropy: bool,
    keep_logits: bool,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    figures = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    none = figures.new_empty(0)
    return figures, torch.empty_like(figures), torch.empty_like(figures) if entropy else none, figures > 0


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, *ctx.numbers, entropy, ctx.keep_logits, _ = inputs
    _, log_z, entropy_T, first_choice = output
    ctx.save_for_backward(logits, targets, log_z, entropy_T)
    ctx.mark_non_differentiable(log_z, first_choice, *([] if entropy else [entropy_T]))
    ctx.entropy = entropy


def _backward(ctx: Any, grad_T: torch.Tensor, _z: Any, grad_entropy_T: torch.Tensor, _first: Any) -> tuple[Any, ...]:
    refuse_second_order()
    try:
        logits, targets, log_z, entropy = ctx.saved_tensors
    except RuntimeError as error:
        raise KernelError(CHANGED) from error
    buffer = logits.clone() if ctx.keep_logits else logits.detach()
    if ctx.entropy:
        token_backward_(buffer, targets, log_z, grad_T, grad_entropy_T, entropy, *ctx.numbers)
    else:
        token_backward_(buffer, targets, log_z, grad_T, None, None, *ctx.numbers)
    return buffer, *[None] * 7


_token_log_probs.register_autograd(_backward, setup_context=_remember)


def refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise KernelError("log-prob kernels have no second derivative; run backward without create_graph=True")


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropy: bool = False,
    keep_logits: bool = False,
) -> TokenLogProbs:
    """Log-probs of `targets` under softmax(logits / temperature) over the vocabulary slices of all ranks of `group`.

    logits: [T, V] float, this rank's slice, column 0 of which is token `vocab_start`; float32, bfloat16 and float16
    have kernels, all arithmetic is float32 (float64 for float64). targets: int64 [T], ids in the whole vocabulary.
    vocab: columns that are tokens, default V; later ones are padding, without probability and with gradient 0.
    entropy: asks for the entropy too. Ranks talk once, 3 or 4 numbers a token; a target on no rank has log-prob -inf.

    Backward turns the logits' own memory into their gradient, so nothing may read them behind it: autograd raises where
    another operation had saved them, but a variable that still names them shows the gradient. `keep_logits` spends
    a copy and leaves them alone; that happens by itself where they are a leaf of the graph or a view of one.
    Raises KernelError for arguments that do not fit, and in backward for logits that were changed since.
    Source: online softmax, arXiv 1805.02867; gradient (onehot - softmax) / temperature.
    """
    check(logits, targets, temperature)
    vocab = logits.shape[1] if vocab is None else vocab
    if not 0 <= vocab <= logits.shape[1]:
        raise KernelError(f"vocab={vocab} must be from 0 to the {logits.shape[1]} columns of logits")
    if not rows_apart(logits):
        logits = logits.contiguous()
    log_probs_T, _, entropy_T, first_choice_T = _token_log_probs(
        logits,
        targets.contiguous(),
        1.0 / temperature,
        vocab_start,
        vocab,
        entropy,
        keep_logits or of_leaf(logits),
        group_name(group),
    )
    return TokenLogProbs(log_probs_T, entropy_T if entropy else None, first_choice_T)


def check(rows: torch.Tensor, targets: torch.Tensor, temperature: float) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise KernelError(f"need floats of two dimensions, a row for each token, got {rows.dtype} {list(rows.shape)}")
    if targets.dtype != torch.int64 or targets.shape != rows.shape[:1] or targets.device != rows.device:
        raise KernelError(
            f"targets must be int64 [{rows.shape[0]}] on {rows.device}, one for each row, "
            f"got {targets.dtype} {list(targets.shape)} on {targets.device}"
        )
    if not temperature > 0:
        raise KernelError(f"temperature={temperature} must be above 0")


def rows_apart(logits: torch.Tensor) -> bool:
    """Whether columns are adjacent and rows do not share memory, as the kernels want it."""
    tokens, columns = logits.shape
    return (columns <= 1 or logits.stride(1) == 1) and (tokens <= 1 or logits.stride(0) >= columns)


def of_leaf(logits: torch.Tensor) -> bool:
    """Whether the memory is a leaf's, which its owner will read again."""
    return logits.is_leaf or (logits._base is not None and logits._base.is_leaf)
