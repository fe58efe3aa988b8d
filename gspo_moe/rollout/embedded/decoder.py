"""Decode steps over the first rows of a cache, on GPUs in buckets of batch and length so that few shapes recur.

Tokens go to rows 0, 1, 2, ... of the cache. In buckets a step has more rows than tokens and looks at more positions
than are filled: rows without a sequence are fed token 0 at position 0, which no other row sees, and their results are
dropped.

Shape letters: N tokens, one a row, V vocabulary, L this pipeline stage's MoE layers, K experts a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as once

import torch

from gspo_moe.model.cache import KVCache
from gspo_moe.rollout.embedded.graphs import GraphPool

logger = logging.getLogger(__name__)
SHORTEST = 64  # positions; fewer are not worth a bucket, and kernels like the mask's rows aligned
POSITIONS_MULTIPLE = 16


@dataclass(frozen=True)
class StepInput:
    """New tokens of the cache's first rows, and the positions that they take there, int64 [N].

    used: how many of the cache's positions to look at, more than any token's.
    most: N of the rank with the most, over those whose experts or weights this one shares.
    """

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    used: int
    most: int


@dataclass(frozen=True)
class StepOutput:
    """logits_NV: behind each token, on the last stage. routes_NLK: where they are recorded."""

    logits_NV: torch.Tensor | None
    routes_NLK: torch.Tensor | None

    def first(self, count: int) -> StepOutput:
        return StepOutput(*(None if x is None else x[:count] for x in (self.logits_NV, self.routes_NLK)))


def bucket(count: int, most: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, ... (powers of two, and three quarters of them) that holds `count`.

    At least `least`, at most `most`, which is at least `count`.
    """
    count = max(count, least)
    power = 1 << (count - 1).bit_length()
    smaller = power * 3 // 4
    return min(most, smaller if count <= smaller else power)


class Decoder:
    """Runs `forward` on one new token a row of `cache`, whose last row is spare. It waits for the device nowhere.

    buckets: pads every step to a bucket. graphs: replays one CUDA graph a bucket; the cache must stay where it is.
    """

    def __init__(
        self,
        forward: Callable[[StepInput], StepOutput],
        cache: KVCache,
        place: torch.device,
        buckets: bool = False,
        graphs: GraphPool | None = None,
    ) -> None:
        assert buckets or graphs is None, "a graph has the shape of its bucket"
        self._forward = forward
        self._cache = cache
        self._buckets = buckets
        self._graphs = graphs
        # What graphs read: the places stay, their contents are the step's.
        self._ids_and_positions = torch.zeros(2, cache.rows, dtype=torch.int64, device=place)

    def step(self, new: StepInput) -> StepOutput:
        """Feeds row n its token n at its position. The output stays as it is until the next step.

        Collective, as `forward` is; a rank may have no tokens.
        """
        if not self._buckets:
            return self._forward(new)
        most = bucket(new.most, 2 * new.most)  # the same on all ranks, and no less than any one's size
        count = len(new.ids_N)
        if not count:
            return self._forward(replace(new, most=most))
        size = bucket(count, self._cache.rows - 1)
        used = bucket(new.used, self._cache.capacity, SHORTEST)
        ids_N, positions_N = self._ids_and_positions[:, :size]
        for place_N, values_N in ((ids_N, new.ids_N), (positions_N, new.positions_N)):
            place_N[:count].copy_(values_N)
            place_N[count:].zero_()
        padded = StepInput(ids_N, positions_N, used, most)
        if self._graphs is None:
            return self._forward(padded).first(count)
        output: StepOutput = self._graphs.run((size, used), lambda: self._forward(padded))
        return output.first(count)


@once
def warn_of_whole_forward(obstacle: str) -> None:
    logger.warning("each token is decoded in a whole training forward, which is slower: %s", obstacle)
