"""The seam of a step: what it learns from, wherever that came from, and each rank's part of it.

Shape letters: T tokens of a sample but the last, A MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gspo_moe.config.architecture import Architecture
from gspo_moe.data.schedule import split_mini_batches
from gspo_moe.errors import DataError, TrainingError
from gspo_moe.parallel.exchange import exchange_rows
from gspo_moe.parallel.groups import Groups
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.routing.replay import check_routes
from gspo_moe.training.packs import Minibatch, TrainingPack, make_packs, plan_packs
from gspo_moe.training.session import Trainer
from gspo_moe.types import Prompt, RolloutGroup, TrainingSample


@dataclass(frozen=True)
class Batch:
    """What `learn` takes; the same on every rank, but for routes, which only the rank that sampled them has.

    groups: those to learn from, in the order of the prompts. samples: their rollouts, in the same order.
    prompts: all that were used up for it. metrics: of everything that was sampled.
    """

    groups: tuple[RolloutGroup, ...]
    samples: tuple[TrainingSample, ...]
    prompts: tuple[Prompt, ...]
    metrics: dict[str, float]

    @property
    def versions(self) -> set[int]:
        """The policy versions that sampled it."""
        return {version for group in self.groups for one in group.rollouts for version, _ in one.versions}


@dataclass(frozen=True)
class StepPacks:
    """This rank's packs of all mini-batches, in their order; (sequences, response tokens) of each over all ranks."""

    packs: list[TrainingPack]
    sizes: tuple[tuple[int, int], ...]

    def minibatches(self) -> list[Minibatch]:
        return [
            Minibatch(tuple(one for one in self.packs if one.minibatch == number), *size)
            for number, size in enumerate(self.sizes)
        ]


def share_packs(trainer: Trainer, batch: Batch) -> StepPacks:
    """Splits the batch into mini-batches and packs; samples come with their routes where those are needed. Collective.

    Raises TrainingError, on every rank, where no plan of micro-batches holds a mini-batch and where routes do not fit.
    """
    config, groups = trainer.session.config, trainer.session.groups
    size = config.rollout.samples_per_prompt
    minibatches = split_mini_batches(len(batch.samples) // size, size, config.algorithm.mini_batches)
    plans = [
        [[[indices[i] for i in one] for one in of_rank] for of_rank in plan_packs(chosen, groups, config)]
        for indices in minibatches
        for chosen in [[batch.samples[i] for i in indices]]
    ]
    samples: Sequence[TrainingSample] = batch.samples
    if config.routing.reports_engine_routes:
        wanted = [[i for plan in plans for one in plan[rank] for i in one] for rank in range(groups.layout.data)]
        raise_everywhere(_route_fault(samples, trainer.session.plan.architecture))
        samples = with_routes(samples, wanted, groups)
    packs = [
        one for number, plan in enumerate(plans) for one in make_packs(samples, plan[groups.data_rank], groups, number)
    ]
    sizes = [(len(m), sum(sum(batch.samples[i].response_mask[1:]) for i in m)) for m in minibatches]
    return StepPacks(packs, tuple(sizes))


def with_routes(
    samples: Sequence[TrainingSample], wanted: Sequence[Sequence[int]], groups: Groups
) -> list[TrainingSample]:
    """The samples, of which those that this rank trains on have their routes. Collective over data and context ranks.

    wanted: by data-parallel rank, the numbers of the samples that it trains on.
    Raises TrainingError, on every rank, where none has the routes of a sample that one wants.
    """
    lengths = [len(one.token_ids) - 1 for one in samples]
    mine = {i: one.routes for i, one in enumerate(samples) if one.routes is not None}
    data_ranks = gather_objects(groups.data_rank, groups.data_context)
    found = exchange_rows(mine, lengths, [wanted[rank] for rank in data_ranks], groups.data_context)
    missing = next((i for i in wanted[groups.data_rank] if i not in found), None)
    fault = f"sample {missing} has no routes; let the rollout engine report them, or turn replay off"
    raise_everywhere(None if missing is None else TrainingError(fault))
    return [replace(one, routes=found.get(i)) for i, one in enumerate(samples)]


def _route_fault(samples: Sequence[TrainingSample], architecture: Architecture) -> TrainingError | None:
    """What is wrong with the routes that this rank has."""
    try:
        check_routes([(i, one) for i, one in enumerate(samples) if one.routes is not None], architecture)
    except DataError as error:
        return TrainingError(str(error))
    return None
