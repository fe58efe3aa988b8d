"""The kernels' definitions in PyTorch operators: the oracle of tests in float64, and what runs where none is built.

Shape letters: T tokens, V columns of this rank's logits, S statistics a token, N sequences. x is a logit times
inverse_temperature. Targets are ids in the whole vocabulary, of which column 0 is `vocab_start`; columns from `vocab`
on are padding. Arguments mean the same in `ops`.
"""

from __future__ import annotations

import torch

ROWS = 64  # bounds the memory of intermediate values


def token_stats(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    entropy: bool,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[T, 3] max m of x, sum exp(x - m), x of the target (-inf if not here); with entropy also sum (x - m) exp(x - m).

    A row without a finite logit has m = -inf and sums 0; NaN and +inf make the sums NaN.
    """
    parts = [logits_TV.new_empty((0, 4 if entropy else 3), dtype=dtype)]
    for logits_RV, targets_R in zip(logits_TV.split(ROWS), targets_T.split(ROWS), strict=True):
        x_RV = logits_RV[:, :vocab].to(dtype) * inverse_temperature
        max_R = (
            x_RV.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(dim=1)
            if vocab
            else x_RV.new_full((len(x_RV),), -torch.inf)
        )
        below_RV = x_RV - torch.where(max_R == -torch.inf, 0.0, max_R)[:, None]
        exp_RV = below_RV.exp()
        columns = [max_R, exp_RV.sum(dim=1), _of_target(x_RV, targets_R - vocab_start)]
        if entropy:
            columns.append(torch.where(below_RV == -torch.inf, 0.0, below_RV * exp_RV).sum(dim=1))
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


def _of_target(x_RV: torch.Tensor, column_R: torch.Tensor) -> torch.Tensor:
    vocab = x_RV.shape[1]
    here_R = (column_R >= 0) & (column_R < vocab)
    if vocab == 0:
        return x_RV.new_full(column_R.shape, -torch.inf)
    return x_RV.gather(1, column_R.clamp(0, vocab - 1)[:, None])[:, 0].masked_fill(~here_R, -torch.inf)


def token_gradient(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    log_z_T: torch.Tensor,
    grad_log_probs_T: torch.Tensor,
    grad_entropy_T: torch.Tensor | None,
    entropy_T: torch.Tensor | None,
    inverse_temperature: float,
    vocab_start: int,
    vocab: int,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[T, V] in `dtype`: gradient of sum grad_log_probs log_prob + grad_entropy entropy with respect to the logits.

    inverse_temperature (grad_log_probs (onehot - p) - grad_entropy p (log p + entropy)), p = exp(x - log_z); 0 on
    padding, and on tokens whose gradients are both 0, whatever they hold.
    """
    log_p_TV = logits_TV[:, :vocab].to(dtype) * inverse_temperature - log_z_T.to(dtype)[:, None]
    p_TV = log_p_TV.exp()
    grad_T = grad_log_probs_T.to(dtype)
    found_TV = p_TV * -grad_T[:, None]
    active_T = grad_T != 0
    if grad_entropy_T is not None and entropy_T is not None:
        spread_TV = torch.where(p_TV == 0, 0.0, p_TV * (log_p_TV + entropy_T.to(dtype)[:, None]))
        found_TV -= grad_entropy_T.to(dtype)[:, None] * spread_TV
        active_T |= grad_entropy_T != 0
    column_T = targets_T - vocab_start
    here_T = (column_T >= 0) & (column_T < vocab)
    if vocab:
        found_TV.scatter_add_(1, column_T.clamp(0, vocab - 1)[:, None], (grad_T * here_T)[:, None])
    found_TV = torch.where(active_T[:, None], found_TV * inverse_temperature, 0.0)
    return torch.nn.functional.pad(found_TV, (0, logits_TV.shape[1] - vocab))


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
    """Makes logits their own gradient, `token_gradient` in their dtype or, for 16 bits, in float32."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    for start in range(0, len(logits_TV), ROWS):
        rows = slice(start, start + ROWS)
        logits_TV[rows] = token_gradient(
            logits_TV[rows],
            targets_T[rows],
            log_z_T[rows],
            grad_log_probs_T[rows],
            None if grad_entropy_T is None else grad_entropy_T[rows],
            None if entropy_T is None else entropy_T[rows],
            inverse_temperature,
            vocab_start,
            vocab,
            dtype,
        ).to(logits_TV.dtype)


def sequence_of_tokens(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[T] the sequence of each token, N behind the last bound."""
    positions_T = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions_T, right=True)


def sequence_sums(
    log_probs_T: torch.Tensor, old_log_probs_T: torch.Tensor, mask_T: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Float64 [N, 2]: over the response tokens of each sequence, sum of log_probs - old_log_probs, and their number."""
    num_sequences = len(cu_seqlens) - 1
    difference_T = torch.where(mask_T, log_probs_T.double() - old_log_probs_T.double(), 0.0)
    both_T2 = torch.stack([difference_T, mask_T.double()], dim=1)
    sums = both_T2.new_zeros((num_sequences + 1, 2))
    return sums.index_add(0, sequence_of_tokens(cu_seqlens, len(mask_T)), both_T2)[:num_sequences].clone()


def sequence_reduce(
    log_probs_T: torch.Tensor,
    old_log_probs_T: torch.Tensor,
    mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    advantages: torch.Tensor,
    advantages_per_token: bool,
    sums_N2: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, ratio and clipped tokens of each sequence, float64 [N], and d sum(loss) / d log_probs, float32 [T].

    SPEC section 1, sequence ratio: s = exp(sum / number); loss = -scale min(s A, clip(s) A), with A a token its mean
    over response tokens. A = 0 gives 0 for any s, infinity too. `sums_N2`, where given, is `sequence_sums` of the
    whole sequences.
    """
    if sums_N2 is None:
        sums_N2 = sequence_sums(log_probs_T, old_log_probs_T, mask_T, cu_seqlens)
    num_sequences = len(cu_seqlens) - 1
    total_N, number_N = sums_N2.unbind(dim=1)
    empty_N = number_N == 0
    ratio_N = torch.where(empty_N, 1.0, (total_N / number_N.clamp(min=1)).exp())
    sequence_T = sequence_of_tokens(cu_seqlens, len(mask_T))
    inside_T = mask_T & (sequence_T < num_sequences)
    index_T = sequence_T.clamp(max=max(num_sequences - 1, 0))
    ratio_T, number_T = (
        values_N[index_T] if num_sequences else sequence_T.double() for values_N in (ratio_N, number_N)
    )
    advantages_T = advantages if advantages_per_token or not num_sequences else advantages[index_T]
    value_T, clipped_T = _clip(ratio_T, advantages_T, clip_low, clip_high)
    share_T = torch.where(inside_T, scale / number_T, 0.0)
    # An infinite ratio times 0 would be NaN.
    flat_T = clipped_T | (advantages_T == 0) | ~inside_T
    grad_T = torch.where(flat_T, 0.0, -share_T * ratio_T * advantages_T).float()
    if advantages_per_token:
        loss_T = torch.where(inside_T, -share_T * value_T, 0.0)
        parts_T2 = torch.stack([loss_T, (clipped_T & inside_T).double()], dim=1)
        sums = parts_T2.new_zeros((num_sequences + 1, 2)).index_add(0, sequence_T, parts_T2)[:num_sequences]
        loss_N, clipped_tokens_N = sums.unbind(dim=1)
    else:
        value_N, clipped_N = _clip(ratio_N, advantages, clip_low, clip_high)
        loss_N = torch.where(empty_N, 0.0, -scale * value_N)
        clipped_tokens_N = clipped_N * number_N
    return loss_N.clone(), ratio_N, clipped_tokens_N.clone(), grad_T


def _clip(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = 1.0 - clip_low, 1.0 + clip_high
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    bounded = torch.where(clipped, ratio.clamp(low, high), ratio)
    return torch.where(advantages == 0, 0.0, bounded * advantages), clipped
