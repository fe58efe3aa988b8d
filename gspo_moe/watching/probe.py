"""The same tokens at every step of somebody else's trainer: how far did the weights move since the last time?"""

from __future__ import annotations

from typing import Any

import torch

from gspo_moe.errors import ConfigError
from gspo_moe.watching.comparison import compare
from gspo_moe.watching.snapshot import Snapshot
from gspo_moe.watching.watcher import Watcher, evaluating


class Probe:
    """Of one model, or a rank's part of one whose every rank makes and measures the same.

    token_ids: int64 [rows, tokens], on the model's device. parts: into how many pieces of equal length the model cuts
    the tokens before its routers (megatron-core's sequence parallelism: the tensor-parallel size); this rank's piece is
    what is measured. Raises ConfigError where they cannot be cut so, or the model has no known router.
    """

    def __init__(self, model: torch.nn.Module, token_ids: torch.Tensor, *, parts: int = 1) -> None:
        rows, tokens = token_ids.shape
        if tokens % parts or tokens < 2 * parts:
            raise ConfigError(
                f"{tokens} tokens a row in {parts} equal parts of two or more; give a multiple of {parts}"
            )
        self._model, self._watcher = model, Watcher(model)
        self._token_ids, self._mask = token_ids, torch.ones(rows, tokens // parts)
        self._old: Snapshot | None = None

    def measure(self, **inputs: Any) -> dict[str, float]:
        """`routing/update/...` of the weights now against those of the last call; empty at the first. One forward.

        inputs: more of the model's arguments. Call it ahead of a training forward, behind which FSDP shards the weights
        again that a forward alone leaves whole.
        """
        with evaluating(self._model), torch.no_grad(), self._watcher.capture(self._mask) as captured:
            self._model(input_ids=self._token_ids, **inputs)
        old, self._old = self._old, captured.snapshot()
        return {} if old is None else compare(old, self._old).figures("update").metrics
