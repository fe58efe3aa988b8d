"""The value function's loss of PPO, clipped as OpenAI's baselines do. Shape letters: T tokens of a pack.

Under context parallelism T is this rank's part of the pack.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gspo_moe.algorithms.statistics import Parts
from gspo_moe.errors import DataError


class ValueMeans(NamedTuple):
    """Float64 scalars near the means of the returns and of R - V_old, about which their moments are taken.

    Those about 0 lose the variance where a mean is far larger than the deviation.
    """

    returns: torch.Tensor
    errors: torch.Tensor


class ValueLoss(NamedTuple):
    """loss: float64 scalar with graph. sums: its detached parts, which add up, for `value_metrics`."""

    loss: torch.Tensor
    sums: Parts


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    value_clip: float | None,
    num_tokens: float,
    means: ValueMeans,
) -> ValueLoss:
    """1/num_tokens sum_t 1/2 max((V - R)^2, (V' - R)^2) over response tokens, V' = V bounded to V_old +- value_clip.

    A token whose V' counts is *clipped* and has no gradient; value_clip None clips nothing.
    values: floats [T] with gradient. old_values, returns: floats [T]; what they hold off the response has no effect.
    response_mask: [T], 0 or 1. num_tokens: response tokens of the whole mini-batch over all micro-batches and ranks.
    means: the same for every pack of a mini-batch. Raises DataError for shapes that differ.
    """
    if not values.shape == old_values.shape == returns.shape == response_mask.shape:
        shapes = [list(each.shape) for each in (values, old_values, returns, response_mask)]
        raise DataError(f"values, old values, returns and mask have shapes {shapes}; give one a token of the same pack")
    response_T = response_mask != 0
    values_T, old_T, returns_T = (each[response_T].double() for each in (values, old_values.detach(), returns.detach()))
    squared_T = (values_T - returns_T).square()
    clipped_T = torch.zeros_like(squared_T, dtype=torch.bool)
    if value_clip is not None:
        bounded_T = old_T + (values_T.detach() - old_T).clamp(-value_clip, value_clip)
        bounded_squared_T = (bounded_T - returns_T).square()
        clipped_T = ((values_T.detach() - old_T).abs() > value_clip) & (bounded_squared_T > squared_T.detach())
        squared_T = torch.where(clipped_T, bounded_squared_T, squared_T)
    total = 0.5 * squared_T.sum()
    error_T = returns_T - old_T - means.errors
    return_T = returns_T - means.returns
    sums = {
        "value_loss": total.detach(),
        "value_clipped": clipped_T.double().sum(),
        "value_return": return_T.sum(),
        "value_return_squares": return_T.square().sum(),
        "value_error": error_T.sum(),
        "value_error_squares": error_T.square().sum(),
    }
    return ValueLoss(total / num_tokens, sums)


def value_metrics(sums: Parts, tokens: float) -> dict[str, float]:
    """`value/loss` and `value/clip_fraction`, means over the response tokens, and 1 - Var(R - V_old) / Var(R).

    The last, `value/explained_variance`, is left out where all returns are equal.
    """
    metrics = {
        "value/loss": sums["value_loss"].item() / tokens,
        "value/clip_fraction": sums["value_clipped"].item() / tokens,
    }
    of_returns, of_errors = (
        sums[f"value_{name}_squares"].item() / tokens - (sums[f"value_{name}"].item() / tokens) ** 2
        for name in ("return", "error")
    )
    if of_returns > 1e-12:
        metrics["value/explained_variance"] = 1.0 - of_errors / of_returns
    return metrics
