"""How far the router moved on each token of a mini-batch, which a loss may weigh its ratios with (arXiv 2510.23027).

Strategy: with one pipeline stage, a pack's routers have all run when its loss is computed, so the training forward
itself brings the shift. With several, earlier stages' scores of that pack lie on other ranks, which are busy with other
packs: there a forward pass of its own goes before the step. Weights stand still in between, so both find the same.

Shape letters: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gspo_moe.model.build import Model
from gspo_moe.routing import comparison
from gspo_moe.routing.recorder import RoutePass, RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.training.packs import TrainingPack, recordings_of, replay_of

ShiftOf = Callable[[int], torch.Tensor]


def router_shift(model: Model, recorder: RouteRecorder, packs: Sequence[TrainingPack], training: RoutePass) -> ShiftOf:
    """What gives gamma [T] (float64) of pack `index` to its loss.

    packs: with recordings that have scores. training: what records the training forward against their routes.
    Collective; with one pipeline stage the result's calls are collective over tensor and context ranks.
    """
    old, layers = recordings_of(packs), recorder.layers
    if is_one_stage(model):
        return lambda index: comparison.router_shift(old[index], training.recorded(index), layers)
    ahead = recorder.start([one.routes_TLK for one in old])
    score(model, [each.pack for each in packs], record=ahead, routes=replay_of(packs), responses_only=True)
    shifts = [comparison.router_shift(*pair, layers) for pair in zip(old, ahead.recordings(), strict=True)]
    return shifts.__getitem__


def is_one_stage(model: Model) -> bool:
    return model.groups.pipeline.size() == 1
