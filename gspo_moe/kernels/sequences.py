"""From token log-probs to the GSPO loss of whole sequences and its gradient, in one launch.

Shape letters: T tokens of a pack (of this rank's part of it), N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gspo_moe.errors import KernelError
from gspo_moe.kernels import ops
from gspo_moe.kernels.reference import sequence_of_tokens
from gspo_moe.kernels.tokens import refuse_second_order


@dataclass(frozen=True)
class SequenceLoss:
    """Float64 [N] each. loss: -scale * J_i, differentiable, whose sum is the pack's loss. ratio: s_i.

    clipped_tokens: response tokens whose gradient the clip removed.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped_tokens: torch.Tensor


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, ratio, clipped_tokens, grad_T = output
    ctx.mark_non_differentiable(ratio, clipped_tokens, grad_T)
    ctx.save_for_backward(grad_T, inputs[3])


def _backward(ctx: Any, grad_N: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second_order()
    grad_T, cu_seqlens = ctx.saved_tensors
    scale_T = torch.nn.functional.pad(grad_N, (0, 1))[sequence_of_tokens(cu_seqlens, len(grad_T))]
    return (grad_T * scale_T).float(), *[None] * 9


ops.sequence_reduce.register_autograd(_backward, setup_context=_remember)


def sequence_reduce(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clips: tuple[float, float],
    scale: float,
    sum_over_context: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> SequenceLoss:
    """loss_i = -scale min(s_i A_i, clip(s_i) A_i), s_i = exp(mean_t d_it) over response tokens, d = log_probs - old.

    log_probs, old_log_probs: float32 [T] nats, gradient to the first only. mask: bool [T], response tokens; what the
    others hold, NaN included, has no effect. cu_seqlens: int64 [N + 1], bounds in T, from 0, never falling; on CUDA
    they are not checked, since that would wait for the device. advantages: [N], or [T], one a token, where each token
    has a term, with the same loss and gradient for equal ones; N where T = N. clips: clip_low and clip_high, ratios are
    bounded by 1 - clip_low and 1 + clip_high. scale: 1 / sequences of the mini-batch.
    sum_over_context: where sequences are split over ranks, adds [N, 2] over them; advantages are then [N], and every
    rank has the whole sequence's figures and the gradient of its own tokens.
    Sums are float64 and in a fixed order. A sequence without response token has ratio 1 and loss 0.
    Raises KernelError for arguments that do not fit. Source: arXiv 2507.18071, sections 4.1 and 4.3.
    """
    tokens, sequences = tuple(mask.shape), (len(cu_seqlens) - 1,)
    if mask.ndim != 1 or mask.dtype != torch.bool or log_probs.shape != tokens or old_log_probs.shape != tokens:
        raise KernelError(
            f"log_probs {list(log_probs.shape)} and old_log_probs {list(old_log_probs.shape)} must have the shape "
            f"[T] of a bool mask, which is {mask.dtype} {list(tokens)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int64:
        raise KernelError(f"cu_seqlens must be int64 [N + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if not cu_seqlens.is_cuda and not (
        cu_seqlens[0] == 0 and cu_seqlens[-1] <= len(mask) and (cu_seqlens.diff() >= 0).all()
    ):
        raise KernelError(f"cu_seqlens must rise from 0 to at most {len(mask)} tokens, got {cu_seqlens.tolist()}")
    per_token = tuple(advantages.shape) != sequences
    if per_token and (tuple(advantages.shape) != tokens or sum_over_context is not None):
        raise KernelError(
            f"advantages {list(advantages.shape)} must be one a sequence, or one a token of whole sequences"
        )
    log_probs_T, old_log_probs_T = log_probs.float().contiguous(), old_log_probs.detach().float().contiguous()
    mask_T, bounds = mask.contiguous(), cu_seqlens.contiguous()
    sums_N2 = None
    if sum_over_context is not None:
        sums_N2 = sum_over_context(
            ops.sequence_sums(log_probs_T.detach(), old_log_probs_T, mask_T, bounds)
        ).contiguous()
    loss_N, ratio_N, clipped_tokens_N, _ = ops.sequence_reduce(
        log_probs_T,
        old_log_probs_T,
        mask_T,
        bounds,
        advantages.detach().double().contiguous(),
        per_token,
        sums_N2,
        *clips,
        scale,
    )
    return SequenceLoss(loss_N, ratio_N, clipped_tokens_N)
