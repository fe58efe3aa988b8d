"""Decode steps over the first rows of a cache, on GPUs in buckets of batch and length so that few shapes recur.

Tokens go to rows 0, 1, 2, ... of the cache. In buckets a step has more rows than tokens and looks at more positions
than are filled: rows without a sequence are fed token 0 at position 0, which no other row sees, and their results are
dropped.

Shape letters: N tokens, one a row, V vocabulary, L this pipeline stage's MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gspo_moe.model.cache import KVCache
from gspo_moe.model.inputs import ModelInput
from gspo_moe.rollout.embedded.graphs import GraphPool

SHORTEST = 64  # positions; fewer are not worth a bucket, and kernels like the mask's rows aligned
POSITIONS_MULTIPLE = 16


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
        forward: Callable[[ModelInput], StepOutput],
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
        self._rows = torch.arange(cache.rows + 1, device=place)

    def step(self, token_ids: list[int], positions: list[int]) -> StepOutput:
        """Feeds row n its token n at its position. The output stays as it is until the next step.

        Collective, as `forward` is; a rank without tokens gives empty lists.
        """
        count, used = len(token_ids), max(positions, default=0) + 1
        size = count
        if self._buckets and count:
            size = bucket(count, self._cache.rows - 1)
            used = bucket(used, self._cache.capacity, SHORTEST)
        empty = [0] * (size - count)
        pinned = self._ids_and_positions.is_cuda  # or the copy would wait for the device
        fed = torch.tensor([token_ids + empty, positions + empty], dtype=torch.int64, pin_memory=pinned)
        self._ids_and_positions[:, :size].copy_(fed, non_blocking=True)
        if self._graphs is None or not size:
            return self._run(size, used).first(count)
        output: StepOutput = self._graphs.run((size, used), lambda: self._run(size, used))
        return output.first(count)

    def _run(self, size: int, used: int) -> StepOutput:
        ids, positions = self._ids_and_positions[:, :size]
        return self._forward(
            ModelInput(
                ids,
                positions,
                self._rows[: size + 1],
                cache=self._cache,
                rows_T=self._rows[:size],
                used=used,
                rows_in_order=True,
            )
        )
