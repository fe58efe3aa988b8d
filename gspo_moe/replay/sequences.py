"""Which sequences of a mini-batch are not finite, and at which token that begins.

Shape letters: T tokens of a pack, S those of one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from gspo_moe.data.packing import subset
from gspo_moe.kernels import TokenLogProbs
from gspo_moe.model.build import Model
from gspo_moe.model.last_stage import LastStage
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.training.packs import Minibatch, Trained, TrainingPack, training_pack
from gspo_moe.training.step import PolicySettings, policy_head


@dataclass(frozen=True)
class SequenceFigures:
    """sample: its number in the step. loss: its share of the mini-batch's.

    log_ratio: mean over its response tokens; None of a demonstration.
    broken: the first response token that is not finite in something, its id and what; None where all are.
    """

    sample: int
    log_ratio: float | None
    loss: float
    broken: tuple[int, int, str] | None

    @property
    def is_finite(self) -> bool:
        return self.broken is None and math.isfinite(self.log_ratio or 0.0) and math.isfinite(self.loss)


@dataclass(frozen=True)
class _Known:
    """Stands for the model's last stage, of one sequence whose log-probs [S] and values [S] are known."""

    split: ContextSplit
    log_probs_S: torch.Tensor
    values_S: torch.Tensor | None

    def log_probs(self, targets: torch.Tensor, *_: Any, **__: Any) -> TokenLogProbs:
        nothing = torch.zeros_like(targets)
        return TokenLogProbs(self.split.local(self.log_probs_S), None, nothing.bool())

    def values(self) -> torch.Tensor:
        assert self.values_S is not None
        return self.split.local(self.values_S)


@torch.no_grad()
def sequence_figures(
    model: Model,
    minibatch: Minibatch,
    trained: Trained,
    settings: PolicySettings,
    shift_T: torch.Tensor | None,
) -> Iterator[SequenceFigures]:
    """Of each sequence of a pack, on the last stage, from the log-probs that its forward gave. Collective over context.

    shift_T: gamma of a loss that weighs by the router's shift. Of a value function the values are the old policy's.
    """
    one = trained.pack
    for number in range(one.pack.num_sequences):
        alone, index_S = _alone(model, one, number)
        assert trained.log_probs_T is not None
        log_probs_S = trained.log_probs_T[index_S]
        old_S = log_probs_S if alone.old_log_probs_T is None else alone.old_log_probs_T
        stage = _Known(alone.split, log_probs_S, None if alone.estimates is None else alone.estimates.values_T)
        shift_of = None if shift_T is None else lambda _, shift_S=shift_T[index_S]: shift_S
        of_minibatch = replace(minibatch, packs=(alone,))
        loss, _ = policy_head(of_minibatch, settings, shift_of, 0, cast(LastStage, stage), index_S)
        mask_S = alone.pack.response_mask_T > 0
        ratio_S = (log_probs_S.double() - old_S.double())[mask_S]
        given = {
            "log-prob": log_probs_S,
            "old log-prob": old_S,
            "rollout log-prob": alone.pack.rollout_log_probs_T,
            "reference log-prob": alone.reference_log_probs_T,
            "ratio": (log_probs_S.double() - old_S.double()).exp(),
        }
        broken = _first_broken(alone.pack.target_ids_T, given, mask_S)
        yield SequenceFigures(alone.pack.sample_indices[0], ratio_S.mean().item(), loss.item(), broken)


def supervised_figures(minibatch: Minibatch, trained: Trained) -> Iterator[SequenceFigures]:
    """The same of demonstrations."""
    pack, log_probs_T = trained.pack.pack, trained.log_probs_T
    assert log_probs_T is not None
    bounds = pack.cu_seqlens.tolist()
    for sample, start, stop in zip(pack.sample_indices, bounds, bounds[1:], strict=False):
        log_probs_S, mask_S = log_probs_T[start:stop], pack.response_mask_T[start:stop] > 0
        loss = -log_probs_S[mask_S].double().sum().item() / minibatch.num_tokens
        broken = _first_broken(pack.target_ids_T[start:stop], {"log-prob": log_probs_S}, mask_S)
        yield SequenceFigures(sample, None, loss, broken)


def _alone(model: Model, one: TrainingPack, number: int) -> tuple[TrainingPack, torch.Tensor]:
    few, index_S = subset(one.pack, [number])

    def of(values_T: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_T is None else values_T[index_S]

    estimates = one.estimates
    if estimates is not None:
        names = ("advantages_T", "values_T", "returns_T")
        estimates = replace(estimates, **{name: getattr(estimates, name)[index_S] for name in names})
    alone = replace(
        training_pack(few, model.groups),
        old_log_probs_T=of(one.old_log_probs_T),
        reference_log_probs_T=of(one.reference_log_probs_T),
        estimates=estimates,
    )
    return alone, index_S


def _first_broken(
    target_ids_S: torch.Tensor, given: Mapping[str, torch.Tensor | None], mask_S: torch.Tensor
) -> tuple[int, int, str] | None:
    """Position among the sequence's tokens, from 0, id, and what is not finite there."""
    broken = {name: mask_S & ~values_S.isfinite() for name, values_S in given.items() if values_S is not None}
    anywhere_S = torch.stack(list(broken.values())).any(dim=0)
    if not anywhere_S.any():
        return None
    first = int(anywhere_S.nonzero()[0, 0])
    name = next(name for name, where_S in broken.items() if where_S[first])
    values_S = given[name]
    assert values_S is not None
    return first + 1, int(target_ids_S[first]), f"{name} {float(values_S[first])}"
