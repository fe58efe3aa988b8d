"""How far the router moved on each token of a mini-batch, which a loss may weigh its ratios with (arXiv 2510.23027).

Strategy: with one pipeline stage, a pack's routers have all run when its loss is computed, so the training forward
itself brings the shift. With several, earlier stages' scores of that pack lie on other ranks, which are busy with other
packs: there a forward pass of its own goes before the step. Weights stand still in between, so both find the same.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gspo_moe.model.build import Model
from gspo_moe.rollout.score import score
from gspo_moe.routing.recorder import Recording, RouteRecorder
from gspo_moe.types import Microbatch

ShiftOf = Callable[[int], torch.Tensor]


def router_shift(
    model: Model,
    recorder: RouteRecorder,
    packs: Sequence[Microbatch],
    old: Sequence[Recording],
    replayed: Sequence[torch.Tensor] | None,
) -> ShiftOf:
    """What gives gamma [T] (float64) of pack `index` to its loss, and a recorder that compares with old's routes.

    old: each pack's routes and scores under the old policy. replayed: routes [T, L, K] a pack that training replays.
    Collective; with one pipeline stage the result's calls are collective over tensor and context ranks.
    """
    routes = [recording.routes_TLK for recording in old]
    recorder.against(routes)
    if is_one_stage(model):
        return lambda index: recorder.router_shift(old[index], recorder.recorded(index))
    score(model, packs, recorder=recorder, routes=replayed)
    shifts = [recorder.router_shift(*pair) for pair in zip(old, recorder.take(), strict=True)]
    recorder.against(routes)
    return shifts.__getitem__


def is_one_stage(model: Model) -> bool:
    return model.groups.pipeline.size() == 1
