"""The periodic check that ranks still hold alike what they must: weights, predictors, the copy that samples."""

from __future__ import annotations

import torch

from gspo_moe.errors import DivergenceError
from gspo_moe.model.build import Model
from gspo_moe.model.replicas import named_over_ranks
from gspo_moe.parallel.equality import Difference, SharedTensors
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.engine import RolloutEngine
from gspo_moe.training.predictor import Predictor

MOST_NAMES = 3


class ReplicaCheck:
    """Of one model, whose parameters stay the same tensors; collective over all ranks, its making too."""

    def __init__(self, model: Model, engine: RolloutEngine, predictor: Predictor | None = None) -> None:
        named: dict[str, torch.Tensor] = {}
        if model.groups.world_size > 1:
            named |= named_over_ranks(model)
            named |= {} if predictor is None else predictor.named(named)
        self._tensors = named
        self._shared = SharedTensors(list(self._tensors))
        self._engine = engine

    def __call__(self, step: int) -> None:
        """Raises DivergenceError, on every rank, that names what differs after so many steps, where and by how much."""
        names, first = self._shared.differing(self._tensors)
        if first is not None:
            raise DivergenceError(_differ(step, names, first))
        copied = self._engine.differing() if isinstance(self._engine, MegatronEngine) else []
        raise_everywhere(DivergenceError(_not_the_trainers(step, copied)) if copied else None)


def _differ(step: int, names: list[str], first: Difference) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in first.values.items():
        ranks.setdefault(repr(value), []).append(rank)
    # Most of the ranks are right, more often than not.
    ordered = sorted(ranks.items(), key=lambda pair: len(pair[1]))
    values = " and ".join(f"{value} on {_ranks(here)}" for value, here in ordered)
    place = f"{first.key}{list(first.index)}"
    return (
        f"after step {step} ranks differ in weights that they must hold alike: {place} is {values}{_more(names)}; the "
        "memory or arithmetic of one of them failed: look for errors of the machine of the rank that is alone (dmesg, "
        "the ECC counts of nvidia-smi), and where none is, try model.deterministic=true"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _more(names: list[str]) -> str:
    others = names[1:]
    if not others:
        return ""
    shown = ", ".join(others[:MOST_NAMES])
    return f"; also {shown}" + (f" and {len(others) - MOST_NAMES} more" if len(others) > MOST_NAMES else "")


def _not_the_trainers(step: int, names: list[str]) -> str:
    return (
        f"after step {step} rollouts come from weights that are not the trainer's, rounded as rollout.numerics asks: "
        f"{names[0]}{_more(names)}; the memory of this machine failed, or something wrote into it"
    )
