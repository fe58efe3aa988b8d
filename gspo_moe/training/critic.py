"""What a value function says of a step's samples before the first update: advantages and returns.

Advantages are whitened over all response tokens of the step, over all ranks: mini-batches are random parts of it, and
one mean and deviation for all keeps their steps comparable.

Shape letters: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from gspo_moe.algorithms import Segments, ValueOptions
from gspo_moe.algorithms.gae import StepMeans, Whitening, gae
from gspo_moe.algorithms.value import ValueMeans
from gspo_moe.errors import TrainingError
from gspo_moe.parallel.groups import Groups
from gspo_moe.parallel.reduce import reduce_statistics
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class Estimates:
    """Of one pack, floats [T], 0 off the response but for `values`: whitened advantages, old values, returns.

    means: of the step's returns and of what the old values miss of them.
    """

    advantages_T: torch.Tensor
    values_T: torch.Tensor
    returns_T: torch.Tensor
    means: ValueMeans


def estimate(
    packs: Sequence[tuple[Microbatch, Segments]], values: Sequence[torch.Tensor], options: ValueOptions, groups: Groups
) -> list[Estimates]:
    """Of each of this rank's packs of the step, of which its `rewards_N` are those of the sequences.

    values: the old policy's [T] a pack, on the last stage; without them, on the others, there are no estimates.
    Collective over the last stage's data-parallel ranks.
    """
    if not values:
        return []
    found = [
        gae(values_T, pack.rewards_N, segments, gamma=options.gamma, lam=options.lam)
        for (pack, segments), values_T in zip(packs, values, strict=True)
    ]
    masks = [pack.response_mask_T for pack, _ in packs]
    sums = [StepMeans.of_pack(*each, mask_T) for each, mask_T in zip(found, masks, strict=True)]
    means = reduce_statistics(reduce(StepMeans.merge, sums), groups.data)
    mean = means.advantage
    squares = [Whitening.of_pack(each, mask_T, mean) for (each, _), mask_T in zip(found, masks, strict=True)]
    whitening = reduce_statistics(reduce(Whitening.merge, squares), groups.data)
    # What the old values miss of the returns are the advantages before whitening.
    of_values = ValueMeans(returns=means.value_return, errors=mean)
    return [
        Estimates(whitening.whiten(advantages_T, mask_T, mean), values_T, returns_T, of_values)
        for mask_T, values_T, (advantages_T, returns_T) in zip(masks, values, found, strict=True)
    ]


def value_fault(estimates: Sequence[Estimates]) -> TrainingError | None:
    """What is wrong with these packs' values or advantages, if anything. One wait for the device."""
    if not estimates or torch.stack([each.advantages_T.isfinite().all() for each in estimates]).all():
        return None
    return TrainingError(
        "the value head's values, or the advantages made of them, are not finite; go on from a checkpoint before the "
        "weights broke, with a lower optimizer.lr or algorithm.options.value_coeff"
    )
