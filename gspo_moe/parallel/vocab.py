"""Token log-probs from logits whose vocabulary is split over the tensor-parallel group.

Shape letters: T tokens, V this rank's slice of the vocabulary, P ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _VocabParallelLogProbs(torch.autograd.Function):
    """log p(target) = z_target - log sum exp z over the whole vocabulary; gradient (onehot - softmax) * grad.

    The three statistics a token needs (max, sum-exp, target logit) travel in one collective.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, targets_T: torch.Tensor, vocab_start: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        wide_TV = logits_TV.double() if logits_TV.dtype == torch.float64 else logits_TV.float()
        here_T, index_T = _places(wide_TV, targets_T - vocab_start)
        max_T = _largest(wide_TV)
        sum_T = torch.exp(wide_TV - max_T[:, None]).sum(dim=1)
        target_T = _picked(wide_TV, here_T, index_T, 0.0)
        statistics = torch.stack([max_T, sum_T, target_T])
        if group is not None and group.size() > 1:
            gathered = statistics.new_empty((group.size() * len(statistics), len(target_T)))
            dist.all_gather_into_tensor(gathered, statistics, group=group)
            maxima_PT, sums_PT, targets_PT = gathered.unflatten(0, (group.size(), -1)).unbind(dim=1)
            max_T = maxima_PT.amax(dim=0)
            sum_T = (sums_PT * torch.exp(maxima_PT - max_T)).sum(dim=0)
            target_T = targets_PT.sum(dim=0)
        log_sum_T = torch.log(sum_T)
        ctx.save_for_backward(logits_TV, max_T + log_sum_T, index_T, here_T)
        return target_T - max_T - log_sum_T  # in this order, since adding two large numbers first would round

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_T,) = grads
        logits_TV, log_normalizer_T, index_T, here_T = ctx.saved_tensors
        grad_TV = torch.exp(logits_TV.to(log_normalizer_T.dtype) - log_normalizer_T[:, None]).mul_(-grad_T[:, None])
        if grad_TV.shape[1]:
            grad_TV.scatter_add_(1, index_T[:, None], (grad_T * here_T)[:, None])
        return grad_TV.to(logits_TV.dtype), None, None, None


def vocab_parallel_log_probs(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Log-probs [T] (nats) of `targets_T` under softmax(logits / temperature) over all ranks' slices.

    logits_TV: [T, V] float, this rank's slice, whose first column is token `vocab_start`; differentiable. A slice may
    have no column, where all rows of a rank are padding.
    The result is fp32, or fp64 for fp64 logits, and the same on every rank of `group`.
    """
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    log_probs_T: torch.Tensor = _VocabParallelLogProbs.apply(logits_TV, targets_T, vocab_start, group)
    return log_probs_T


@torch.no_grad()
def vocab_parallel_first_choice(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, vocab_start: int = 0, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Whether no token's logit exceeds the target's, bool [T]; arguments as in `vocab_parallel_log_probs`."""
    places = _places(logits_TV, targets_T - vocab_start)
    both = torch.stack([_largest(logits_TV), _picked(logits_TV, *places, -torch.inf)])
    if group is not None and group.size() > 1:
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return both[1] >= both[0]


def _places(logits_TV: torch.Tensor, column_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the targets' columns are here, and columns that are."""
    width = logits_TV.shape[1]
    return (column_T >= 0) & (column_T < width), column_T.clamp(0, max(width - 1, 0))


def _largest(logits_TV: torch.Tensor) -> torch.Tensor:
    """The largest logit of each token; finite where there is none, so that a difference of two is no NaN."""
    if logits_TV.shape[1] == 0:
        return logits_TV.new_full(logits_TV.shape[:1], torch.finfo(logits_TV.dtype).min)
    return logits_TV.amax(dim=1)


def _picked(logits_TV: torch.Tensor, here_T: torch.Tensor, index_T: torch.Tensor, otherwise: float) -> torch.Tensor:
    if logits_TV.shape[1] == 0:
        return logits_TV.new_full(logits_TV.shape[:1], otherwise)
    return logits_TV.gather(1, index_T[:, None])[:, 0].masked_fill(~here_T, otherwise)
