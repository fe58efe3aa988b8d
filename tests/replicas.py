"""Bits that are flipped in one rank's weights, and what the periodic check finds of them."""

from __future__ import annotations

import pytest
import torch

from gspo_moe.errors import DivergenceError
from gspo_moe.model.build import Model
from gspo_moe.model.replicas import named_over_ranks
from gspo_moe.parallel.equality import SharedTensors
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.training.replicas import ReplicaCheck


def flip(parameter: torch.Tensor, index: tuple[int, ...]) -> None:
    """The lowest bit of one element."""
    bits = parameter.detach().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
    bits[index] ^= 1


def is_shared(name: str, parameter: torch.nn.Parameter, stage: str, tied: bool) -> bool:
    """Whether two ranks of a layout of two have the parameter whole, by what the layouts are."""
    if stage in ("data", "context"):
        return True
    if stage == "expert":
        return ".experts." not in name
    if stage == "tensor":
        return ".experts." not in name and not getattr(parameter, "tensor_model_parallel", False)
    return tied and "word_embeddings" in name


def check_replicas(model: Model, stage: str, tied: bool) -> None:
    """On two ranks: nothing differs; a bit flipped in all of the second's is found in what both have, and no other."""
    named, second = named_over_ranks(model), model.groups.rank == 1
    check, shared = ReplicaCheck(model, MegatronEngine(model, 1, 1)), SharedTensors(list(named))
    check(3)
    expected = {name for name, parameter in named.items() if is_shared(name, parameter, stage, tied)}
    for parameter in named.values() if second else ():
        flip(parameter, (0,) * parameter.ndim)
    assert set(shared.differing(named)[0]) == set().union(*gather_objects(expected)), stage
    for parameter in named.values() if second else ():
        flip(parameter, (0,) * parameter.ndim)
    if not any(gather_objects(bool(expected))):
        return
    name = sorted(set().union(*gather_objects(expected)))[-1]
    index = tuple(size - 1 - (size > 2) for size in named[name].shape) if name in named else ()
    if second:
        flip(named[name], index)
    values = gather_objects(repr(float(named[name][index])) if name in named else None)
    with pytest.raises(DivergenceError) as caught:
        check(3)
    told = f"after step 3 ranks differ in weights that they must hold alike: {name}{list(index)} is {values[0]} on rank"
    assert str(caught.value).startswith(f"{told} 0 and {values[1]} on rank 1; the memory"), (stage, str(caught.value))
    if second:
        flip(named[name], index)
    check(3)
