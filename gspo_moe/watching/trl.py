"""`routing/update/*` beside the metrics of a trainer of TRL's or transformers'. Needs transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from gspo_moe.errors import ConfigError
from gspo_moe.watching.comparison import Comparison, compare
from gspo_moe.watching.snapshot import Snapshot
from gspo_moe.watching.texts import Batch, encode
from gspo_moe.watching.watcher import Watcher

Probe = str | tuple[str, str]  # a text, of which all tokens count, or a prompt with a response, whose tokens alone do


def log_routing(trainer: Any, probes: Sequence[Probe], *, every: int = 1, attribution: bool = True) -> None:
    """From now on every `every`-th step of `trainer.train()` is measured on these texts, and logged with its metrics.

    Names are `routing/update/...` (docs/spec.md, section 4): weights now against those of the last measurement; the
    noise floor is of the first weights twice. A measurement is one forward of all probes in one batch, two with
    attribution (phi and W). In several processes each runs all of them. Raises ConfigError for no probe, or a model
    without a known router; training raises it at its start where attribution is asked of one that holds no routes.
    """
    if not probes or every < 1:
        raise ConfigError(f"{len(probes)} probes every {every} steps; give one or more, every 1 step or more")
    rows = [
        encode(trainer.processing_class, *([probe] if isinstance(probe, str) else reversed(probe))) for probe in probes
    ]
    callback = RoutingCallback(Watcher(trainer.model), Batch.of(rows), every, attribution)
    # Ahead of those that report to TensorBoard and others, as what it adds to the log is for them.
    trainer.callback_handler.callbacks.insert(0, callback)


class RoutingCallback(TrainerCallback):
    """What `log_routing` adds to a trainer."""

    def __init__(self, watcher: Watcher, batch: Batch, every: int, attribution: bool) -> None:
        self._watcher = watcher
        self._batch = batch
        self._every = every
        self._attribution = attribution
        self._old: Snapshot | None = None
        self._floor: Comparison | None = None
        self._figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **more: Any) -> None:
        self._batch = self._batch.to(model.device)
        self._old = self._snapshot()
        self._floor = compare(self._old, self._snapshot())
        if self._attribution:  # an error now, not behind the first step
            try:
                self._snapshot(self._old.routes_TLK)
            except ConfigError as error:
                raise ConfigError(f"{error}; or log_routing(..., attribution=False)") from error

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self._every:
            return
        assert self._old is not None
        new = self._snapshot()
        held = self._snapshot(self._old.routes_TLK) if self._attribution else None
        self._figures = compare(self._old, new, held).figures("update", self._floor).metrics
        self._old = new

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any) -> None:
        if "loss" not in logs:  # of an evaluation, or the end's summary
            return
        logs |= self._figures
        state.log_history[-1] |= self._figures  # the trainer keeps a copy, which it has made before
        self._figures = {}

    def _snapshot(self, routes: torch.Tensor | None = None) -> Snapshot:
        batch = self._batch
        return self._watcher.snapshot(
            batch.input_ids, batch.attention_mask, batch.response_mask, routes=routes, use_cache=False
        )
