"""Log-probs and routes of given sequences: one forward pass through the training model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gspo_moe.model.build import Model
from gspo_moe.model.forward import no_recording, run, token_log_probs
from gspo_moe.model.inputs import microbatch_input
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.types import Microbatch


def score(
    model: Model,
    microbatches: Sequence[Microbatch],
    *,
    temperature: float = 1.0,
    recorder: RouteRecorder | None = None,
) -> list[torch.Tensor]:
    """Log-probs [T] (fp32, nats) of each pack's targets at `temperature`; on the last pipeline stage, else empty.

    A given recorder keeps the routes of the same pass.
    """

    def head(index: int, output_TX: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, token_log_probs(model, output_TX, microbatches[index].target_ids_T, temperature).log_probs

    inputs = [microbatch_input(microbatch) for microbatch in microbatches]
    record = no_recording if recorder is None else recorder.scope
    return run(model, inputs, head, backward=False, record=record, for_log_probs=True)
