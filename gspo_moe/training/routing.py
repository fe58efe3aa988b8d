"""What one RL step replays and measures of the router: the pairs of SPEC section 4, load, and the layers' figures.

Shape letters: T tokens of a pack, L this stage's MoE layers, A all MoE layers, K experts a token, B margin bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
import torch

from gspo_moe.model.build import Model
from gspo_moe.parallel.reduce import reduce_statistics
from gspo_moe.routing import LoadSums, PairSums
from gspo_moe.routing.comparison import compare, expert_load_of
from gspo_moe.routing.figures import Figures, pair_figures, with_interval
from gspo_moe.routing.recorder import Recording, RouteRecorder, routers_of
from gspo_moe.routing.shards import StageLayers
from gspo_moe.scoring.score import score
from gspo_moe.training.lag import Lags, routes_by_lag
from gspo_moe.training.packs import Trained, TrainingPack, microbatches, recordings_of
from gspo_moe.types import Microbatch


def engine_routes(model: Model, packs: Sequence[Microbatch]) -> list[torch.Tensor]:
    """The rollout engine's routes [T, L, K] of this stage's layers."""
    layers = [router.layer_number - 1 for router in routers_of(model.chunks)]
    return [_reported(pack)[:, layers] for pack in packs]


def _reported(pack: Microbatch) -> torch.Tensor:
    assert pack.routes_TAK is not None, "the engine was not asked for routes"
    return pack.routes_TAK


def compare_packs(
    packs: Sequence[Microbatch], old: Sequence[Recording], new: Sequence[Recording], layers: StageLayers
) -> PairSums:
    """One pair's sums over all ranks. Collective."""
    found = [compare(*each, layers) for each in zip(packs, old, new, strict=True)]
    return reduce_statistics(_merged(found), layers.groups.data)


def _merged(sums: Iterable[PairSums]) -> PairSums:
    return reduce(PairSums.merge, sums)


def routing_figures(
    model: Model,
    layers: StageLayers,
    trained: Sequence[Sequence[Trained]],
    equal_weights: bool,
    lags: Lags | None = None,
) -> Figures:
    """The pairs that cost no forward pass, and the load of the training forwards, of each mini-batch. Collective.

    equal_weights: the rollouts were sampled from the weights that the step began with. lags: else how old they may be.
    """
    figures = load_figures([one.recording for each in trained for one in each if one.recording is not None], layers)
    packs = [one.pack for each in trained for one in each]
    if recordings_of(packs):
        figures.add(staleness(trained, layers))
        if packs[0].pack.routes_TAK is not None:
            figures.add(engine_figures(model, packs, equal_weights, layers))
        if lags is not None:
            figures.add(_by_lag(model, [one for each in trained for one in each], lags, layers))
    return figures


def _by_lag(model: Model, trained: Sequence[Trained], lags: Lags, layers: StageLayers) -> Figures:
    """The pairs by how old a token is: trainer against rollout engine is what that many steps moved."""
    packs = [one.pack for one in trained]
    whole, old = microbatches(packs), recordings_of(packs)
    figures = routes_by_lag("staleness", whole, zip(old, recordings_of(trained), strict=True), lags, layers)
    if whole[0].routes_TAK is not None:
        reported = [Recording(routes) for routes in engine_routes(model, whole)]
        figures.add(routes_by_lag("engine", whole, zip(reported, old, strict=True), lags, layers))
    return figures


def staleness(trained: Sequence[Sequence[Trained]], layers: StageLayers) -> Figures:
    """Each mini-batch's training forward against the old policy. The first runs at equal weights. Collective.

    Empty where no token was compared, as in a step whose answers all have one token.
    """
    sums = []
    for each in trained:
        packs = [one.pack for one in each]
        sums.append(compare_packs(microbatches(packs), recordings_of(packs), recordings_of(each), layers))
    figures = pair_figures("staleness", _merged(sums), sums[0])
    for number, one in enumerate(sums, start=1):
        for name, value in one.to_metrics().items():
            if isinstance(value, float):
                figures.metrics[f"routing/staleness/{name}/mini_batch_{number}"] = value
    for name in ("slot_change", "flip_rate"):
        by_layer = figures.layers.get(f"routing/staleness/{name}", np.empty(0))
        figures.metrics |= {f"routing/staleness/{name}/layer_{i:02d}": float(v) for i, v in enumerate(by_layer)}
    return figures


def load_figures(recordings: Sequence[Recording], layers: StageLayers) -> Figures:
    """Expert load of SPEC section 4 over all tokens of these passes. Collective."""
    sums = reduce_statistics(LoadSums.from_load(expert_load_of(recordings, layers)), layers.groups.data)
    return Figures(sums.to_metrics(), {"routing/load/tokens": sums.sums["load_LE"].cpu().numpy()})


def engine_figures(model: Model, packs: Sequence[TrainingPack], equal_weights: bool, layers: StageLayers) -> Figures:
    """Rollout engine against trainer. At equal weights the pair is its own floor; older rollouts have none."""
    whole = microbatches(packs)
    reported = [Recording(routes) for routes in engine_routes(model, whole)]
    sums = compare_packs(whole, reported, recordings_of(packs), layers)
    figures = with_interval(pair_figures("engine", sums, sums if equal_weights else None), "engine", sums)
    load = load_figures(reported, layers)
    for name in ("max_violation", "cv", "entropy"):
        figures.metrics[f"routing/load/rollout/{name}"] = load.metrics[f"routing/load/{name}"]
    figures.layers["routing/load/rollout/tokens"] = load.layers["routing/load/tokens"]
    return figures


class Probe:
    """The update pair: a fixed probe set, scored before and after one optimizer step."""

    def __init__(self, model: Model, recorder: RouteRecorder, packs: Sequence[TrainingPack]) -> None:
        """Scores the packs twice at the weights as they are, before the step. Collective."""
        self._model, self._recorder, self._packs = model, recorder, microbatches(packs)
        self._before = self._routes(None)
        self._floor = self._compare()

    def figures(self) -> Figures:
        """After the step. Collective."""
        sums = self._compare()
        return with_interval(pair_figures("update", sums, self._floor), "update", sums)

    def _compare(self) -> PairSums:
        after = self._routes([recording.routes_TLK for recording in self._before])
        return compare_packs(self._packs, self._before, after, self._recorder.layers)

    def _routes(self, reference: Sequence[torch.Tensor] | None) -> list[Recording]:
        record = self._recorder.start(reference)
        score(self._model, self._packs, record=record, responses_only=True)
        return record.recordings()
