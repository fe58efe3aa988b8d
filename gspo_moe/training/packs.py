"""What training knows of one pack, made here and passed on, and which samples are whose.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from gspo_moe.algorithms.ratios import Segments
from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.data.schedule import plan_microbatches
from gspo_moe.errors import DataError, TrainingError
from gspo_moe.parallel.context import ContextSplit, sum_over
from gspo_moe.parallel.groups import Groups
from gspo_moe.platform import device
from gspo_moe.routing.prediction import Foretold
from gspo_moe.routing.recorder import Recording
from gspo_moe.routing.replay import Replayed
from gspo_moe.training.critic import Estimates
from gspo_moe.types import Microbatch, TrainingSample


@dataclass(frozen=True)
class TrainingPack:
    """One pack on this rank.

    minibatch: the number of its mini-batch. split: which of its tokens this context rank has.
    segments: its sequences. local_segments: those of this context rank's tokens.
    old_log_probs_T, estimates (of a value function): of the old policy; reference_log_probs_T: of a KL penalty's
        reference, None without one. All three are None off the last stage.
    recording: routes of the old policy's pass, with scores; None where it was not recorded. As old_log_probs_T None
        before the training forward where that is the old policy's pass (`old_policy.first_scored`).
    replay_TLK: routes to be replayed, None without replay. gates_TLK, held_TL: what is replayed beside them, and where,
        as `routing.replay` takes it. foretold: where it is predicted, what by, for the predictors to learn from.
    """

    pack: Microbatch
    minibatch: int
    split: ContextSplit
    segments: Segments
    local_segments: Segments
    old_log_probs_T: torch.Tensor | None = None
    reference_log_probs_T: torch.Tensor | None = None
    recording: Recording | None = None
    replay_TLK: torch.Tensor | None = None
    gates_TLK: torch.Tensor | None = None
    held_TL: torch.Tensor | None = None
    foretold: Foretold | None = None
    estimates: Estimates | None = None

    @property
    def old_routes_TLK(self) -> torch.Tensor:
        """What old_log_probs_T were taken with: the replayed routes, or the router's own."""
        if self.replay_TLK is not None:
            return self.replay_TLK
        assert self.recording is not None, "neither recorded nor replayed"
        return self.recording.routes_TLK


@dataclass(frozen=True)
class Minibatch:
    """This rank's packs of one mini-batch, and how many sequences and response tokens it has over all ranks."""

    packs: tuple[TrainingPack, ...]
    num_sequences: int
    num_tokens: int


@dataclass(frozen=True)
class Trained:
    """What the training forward found of a pack.

    log_probs_T: on the last stage, 0 off the response. recording: where one was made.
    foretold_TLK: what predictors foretell of this forward, where that is to be held against what is replayed.
    """

    pack: TrainingPack
    log_probs_T: torch.Tensor | None = None
    recording: Recording | None = None
    foretold_TLK: torch.Tensor | None = None


P = TypeVar("P", TrainingPack, Trained)


def plan_packs(samples: Sequence[TrainingSample], groups: Groups, config: Config) -> list[list[list[int]]]:
    """The samples of each data-parallel rank's packs, as `data.schedule.plan_microbatches`.

    Raises TrainingError, on every rank, where no plan of micro-batches holds them.
    """
    layout = groups.layout
    multiple_of = layout.pipeline if layout.virtual_pipeline else 1
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    try:
        return plan_microbatches(lengths, layout.data, config.schedule.micro_batch_tokens, multiple_of=multiple_of)
    except DataError as error:
        raise TrainingError(str(error)) from error


def make_packs(
    samples: Sequence[TrainingSample], plan: Sequence[Sequence[int]], groups: Groups, minibatch: int = 0
) -> list[TrainingPack]:
    """This rank's packs, on this process's device; plan: the samples of each. Collective over context ranks."""
    return [training_pack(pack(samples, indices).to(device().torch_device), groups, minibatch) for indices in plan]


def pack_share(samples: Sequence[TrainingSample], groups: Groups, config: Config) -> list[TrainingPack]:
    """This rank's packs of a batch that all ranks know. Raises as `plan_packs`."""
    return make_packs(samples, plan_packs(samples, groups, config)[groups.data_rank], groups)


def training_pack(whole: Microbatch, groups: Groups, minibatch: int = 0) -> TrainingPack:
    """A pack on this process's device, of which nothing else is known yet. Collective over context ranks."""
    split = ContextSplit(whole.cu_seqlens, groups.context)
    segments = local = Segments.of_pack(whole.cu_seqlens, whole.response_mask_T)
    if groups.layout.context > 1:
        local = Segments.of_pack(split.bounds, split.local(whole.response_mask_T), sum_over(groups.context))
    return TrainingPack(whole, minibatch, split, segments, local)


def with_each(packs: Sequence[P], **found: Sequence[Any]) -> list[P]:
    """The packs with these fields, given by pack; those of which there is nothing here stay as they are."""
    given = {name: values for name, values in found.items() if values}
    assert all(len(values) == len(packs) for values in given.values())
    return [replace(one, **{name: values[i] for name, values in given.items()}) for i, one in enumerate(packs)]


def microbatches(packs: Sequence[TrainingPack]) -> list[Microbatch]:
    return [one.pack for one in packs]


def recordings_of(packs: Sequence[TrainingPack | Trained]) -> list[Recording]:
    """Of packs that all or none have one."""
    return [one.recording for one in packs if one.recording is not None]


def replay_of(packs: Sequence[TrainingPack]) -> list[Replayed] | None:
    """What each pack replays, as `routing.replay` takes it."""
    found = [Replayed(one.replay_TLK, one.gates_TLK, one.held_TL) for one in packs if one.replay_TLK is not None]
    return found or None
