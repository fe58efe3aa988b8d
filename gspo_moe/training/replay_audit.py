"""What a step's Routing Replay did, as figures; ends the run where it was not what the configuration says.

Shape letters: L this pipeline stage's MoE layers, A all MoE layers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch

from gspo_moe.algorithms.statistics import Mergeable
from gspo_moe.config.schema import Config
from gspo_moe.errors import TrainingError
from gspo_moe.parallel.reduce import reduce_statistics
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.platform import device
from gspo_moe.routing.audit import ReplaySums, alignment_faults, replay_sums, wrong_runs
from gspo_moe.routing.figures import Figures
from gspo_moe.routing.recorder import routers_of
from gspo_moe.routing.shards import StageLayers
from gspo_moe.routing.volatility import overlap_TL
from gspo_moe.training.old_policy import first_scored
from gspo_moe.training.session import Session, Trainer
from gspo_moe.training.step import MinibatchResult
from gspo_moe.types import Microbatch

FIX = (
    "; what was trained is not what routing.replay says, so go on from the checkpoint before this step, with "
    "routing.audit=warn if it is and the audit is wrong"
)
ALIGNMENT = ("aligned", "aligned_by_chance", "aligned_shifted")

_log = logging.getLogger(__name__)


def replay_figures(trainer: Trainer, results: Sequence[MinibatchResult], equal_weights: bool) -> Figures:
    """Of the step's mini-batches, over all ranks; empty without replay. Collective.

    equal_weights: the rollouts were sampled from the weights that the step began with.
    Raises TrainingError, on every rank, for the first fault, by the layer, sample or mini-batch that it is of, unless
    `routing.audit` says otherwise. Shares of slots need `routing.record`.
    """
    session = trainer.session
    config, model = session.config, session.model
    if config.routing.replay == "none":
        return Figures()
    numbers = tuple(router.layer_number - 1 for router in routers_of(model.chunks))
    layers = StageLayers(numbers, model.architecture, model.groups)
    rows = _rows(results, layers)
    figures = Figures(_shares(rows))
    faults = [*_lacking(config, results), *_not_taken(rows)]
    norms = [(norm, one.update.skipped) for one in results if (norm := one.update.router_grad_norm) is not None]
    if norms:
        taken = [norm for norm, skipped in norms if not skipped]
        figures.metrics["routing/replay/router_grad_norm"] = sum(taken) / len(taken) if taken else math.nan
        faults += _no_gradient(results, model.architecture.num_experts_per_tok)
    if all(one.recording is not None for result in results for one in result.packs):
        equal_weights |= config.routing.replays_old_pass
        sums, first = _sums(results, layers)
        sums = reduce_statistics(sums, model.groups.data).cpu()
        figures.metrics |= sums.to_metrics()
        # Live routes of a forward that was not finite are arbitrary.
        if config.routing.audit != "off" and not results[0].update.skipped:
            found = [run for one in first if equal_weights for run in wrong_runs(*one, sums, layers)]
            faults += alignment_faults(sums, equal_weights, found)
    _report(session, faults, figures.metrics)
    return figures


def _report(session: Session, faults: Sequence[str], metrics: Mapping[str, float]) -> None:
    """Raises the first fault, with the figures that a step that ends here does not log, or warns. Collective."""
    routing = session.config.routing
    if routing.audit == "off":
        return
    named = {name: metrics.get(f"routing/replay/{name}") for name in ALIGNMENT}
    figures = ", ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
    told = f" ({figures})" if figures else ""
    try:
        raise_everywhere(TrainingError(f"routing.replay={routing.replay}: {faults[0]}{told}{FIX}") if faults else None)
    except TrainingError as fault:
        if routing.audit == "error":
            raise
        if session.groups.is_main:
            _log.warning("%s", fault)


class Rows(Mergeable):
    """Tokens by layer, [A].

    every: of the training forwards. given: with routes to replay. taken: that routers took routes for. held: of those,
    the ones that were not left to the live router.
    """


def _rows(results: Sequence[MinibatchResult], layers: StageLayers) -> Mergeable:
    """Over all ranks. Collective."""
    packs = [one.pack for result in results for one in result.packs]
    every = sum(one.split.num_local for one in packs)
    given = sum(one.split.num_local for one in packs if one.replay_TLK is not None)
    taken = [sum(result.ledger.rows.get(layer, 0) for result in results) for layer in layers.indices]
    counts = torch.tensor([[every, given, each, each] for each in taken], dtype=torch.float64)
    counts = counts.reshape(len(taken), 4).to(device().torch_device)
    for one in packs:
        if one.held_TL is not None:
            counts[:, 3] -= (~one.split.local(one.held_TL)).sum(dim=0)
    spread = layers.spread(counts[None])[0]
    rows = Rows(dict(zip(("every", "given", "taken", "held"), spread.unbind(dim=1), strict=True)), {})
    return reduce_statistics(rows, layers.groups.data_context).cpu()


def _shares(rows: Mergeable) -> dict[str, float]:
    every, given, taken, held = (rows.sums[name].sum().item() for name in ("every", "given", "taken", "held"))
    found = {"routing/replay/coverage": held / every}
    return found | ({"routing/replay/consumed": taken / given} if given else {})


def _lacking(config: Config, results: Sequence[MinibatchResult]) -> Iterator[str]:
    """Mini-batches that are to be replayed and have nothing to replay."""
    first = 0 if config.routing.replay == "r3" else first_scored(config)
    for number, result in enumerate(results):
        if number >= first and any(one.pack.replay_TLK is None for one in result.packs):
            yield f"mini-batch {number + 1} had no routes to replay"


def _not_taken(rows: Mergeable) -> Iterator[str]:
    given_A, taken_A = (rows.sums[name].tolist() for name in ("given", "taken"))
    most = max(given_A)
    for layer, (given, taken) in enumerate(zip(given_A, taken_A, strict=True)):
        if not taken == given == most:
            yield f"MoE layer {layer} took the routes of {taken:.0f} tokens where there were {most:.0f}, each once"


def _no_gradient(results: Sequence[MinibatchResult], topk: int) -> Iterator[str]:
    """The weight of a single expert is 1 whatever its router says, so that top-1 routers have no gradient."""
    updates = [result.update for result in results if not result.update.skipped]
    if topk > 1 and any(one.grad_norm > 0 for one in updates) and not any(one.router_grad_norm for one in updates):
        yield "routers got no gradient, though they weigh the replayed experts and are not frozen"


def _sums(
    results: Sequence[MinibatchResult], layers: StageLayers
) -> tuple[ReplaySums, list[tuple[Microbatch, torch.Tensor]]]:
    """Of all packs, and the first mini-batch's replayed packs with the overlap of their routes, [T, L]."""
    sums, first = list[ReplaySums](), list[tuple[Microbatch, torch.Tensor]]()
    for number, result in enumerate(results):
        for one in result.packs:
            assert one.recording is not None
            pack, replayed, live = one.pack.pack, one.pack.replay_TLK, one.recording.routes_TLK
            expected = both_TL = None
            if number == 0:
                expected = live if one.foretold_TLK is None else one.foretold_TLK
            if replayed is not None and expected is not None:
                both_TL = overlap_TL(replayed, expected)
                first.append((pack, both_TL))
            sums.append(replay_sums(pack, replayed, live, expected, layers, one.pack.held_TL, both_TL))
    return reduce(ReplaySums.merge, sums), first
