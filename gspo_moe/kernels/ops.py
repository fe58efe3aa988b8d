"""The primitive ops: schema, fake, and the reference that runs where csrc has no kernel for a device.

Shape letters and arguments are those of `reference`. Importing this module loads the compiled kernels, which take
float32, bfloat16 and float16; results are float32, or float64 for float64 logits, which the reference always computes.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

from gspo_moe.kernels import reference
from gspo_moe.kernels.library import kernels, note_reference

kernels()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and gradients of logits in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


@custom_op("gspo_moe::token_stats", mutates_args=())
def _token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    entropy: bool,
) -> torch.Tensor:
    note_reference(logits.device.type)
    return reference.token_stats(logits, targets, inverse_temperature, vocab_start, vocab, entropy, wide(logits.dtype))


@_token_stats.register_fake
def _(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    entropy: bool,
) -> torch.Tensor:
    return logits.new_empty((logits.shape[0], 4 if entropy else 3), dtype=wide(logits.dtype))


def token_stats(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    entropy: bool,
) -> torch.Tensor:
    """`reference.token_stats`, one read of the logits. logits_TV: adjacent columns, rows that do not overlap."""
    if logits_TV.dtype == torch.float64:
        return reference.token_stats(logits_TV, targets_T, inverse_temperature, vocab_start, vocab, entropy)
    found: torch.Tensor = _token_stats(logits_TV, targets_T, inverse_temperature, vocab_start, vocab, entropy)
    return found


@custom_op("gspo_moe::token_backward_", mutates_args=("logits",))
def _token_backward_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_z: torch.Tensor,
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor | None,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
) -> None:
    note_reference(logits.device.type)
    reference.token_backward_(
        logits, targets, log_z, grad_log_probs, grad_entropy, entropy, inverse_temperature, vocab_start, vocab
    )


def token_backward_(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    log_z_T: torch.Tensor,
    grad_log_probs_T: torch.Tensor,
    grad_entropy_T: torch.Tensor | None,
    entropy_T: torch.Tensor | None,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
) -> None:
    """`reference.token_gradient` in place of the logits: one read and one write of them."""
    backward_ = reference.token_backward_ if logits_TV.dtype == torch.float64 else _token_backward_
    backward_(
        logits_TV,
        targets_T,
        log_z_T.contiguous(),
        grad_log_probs_T.to(log_z_T.dtype).contiguous(),
        None if grad_entropy_T is None else grad_entropy_T.to(log_z_T.dtype).contiguous(),
        None if grad_entropy_T is None else entropy_T,
        inverse_temperature,
        vocab_start,
        vocab,
    )


@custom_op("gspo_moe::accumulate_", mutates_args=("total",))
def _accumulate_(total: torch.Tensor, part: torch.Tensor) -> None:
    note_reference(total.device.type)
    total += part


def accumulate_(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part of the same shape, without the copy of `part` in total's dtype that PyTorch makes on the CPU."""
    if total.dtype == torch.float32 and total.is_contiguous() and not total.is_cuda:
        _accumulate_(total, part.contiguous())
    else:
        total += part


@custom_op("gspo_moe::sequence_sums", mutates_args=())
def sequence_sums(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    note_reference(log_probs.device.type)
    return reference.sequence_sums(log_probs, old_log_probs, mask, cu_seqlens)


@sequence_sums.register_fake
def _(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    return log_probs.new_empty((cu_seqlens.shape[0] - 1, 2), dtype=torch.float64)


@custom_op("gspo_moe::sequence_reduce", mutates_args=())
def sequence_reduce(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    advantages: torch.Tensor,
    advantages_per_token: bool,
    sums: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    note_reference(log_probs.device.type)
    return reference.sequence_reduce(
        log_probs,
        old_log_probs,
        mask,
        cu_seqlens,
        advantages,
        advantages_per_token,
        sums,
        clip_low,
        clip_high,
        scale,
    )


@sequence_reduce.register_fake
def _(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    advantages: torch.Tensor,
    advantages_per_token: bool,
    sums: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, ratio, clipped = (log_probs.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float64) for _ in range(3))
    return loss, ratio, clipped, torch.empty_like(log_probs)
