"""Reads what `training.dump` has written of a mini-batch.

Shape letters: A all MoE layers, L this pipeline stage's, K experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gspo_moe.algorithms.value import ValueMeans
from gspo_moe.errors import DataError
from gspo_moe.parallel.groups import Groups
from gspo_moe.platform import device
from gspo_moe.routing.recorder import OwnScores, Recording
from gspo_moe.training.critic import Estimates
from gspo_moe.training.dump import ESTIMATES, OF_OLD_POLICY, Described, files_of
from gspo_moe.training.packs import TrainingPack, training_pack
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class Dump:
    """One data-parallel rank's file; tensors by name, on the CPU."""

    file: Path
    described: Described
    tensors: Mapping[str, torch.Tensor]


def read_dumps(file: Path) -> list[Dump]:
    """Of every data-parallel rank, in order. Raises DataError for files that are no such dump, or not all there."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a file step_..._rank_....safetensors of a run's folder skipped")
    found = sorted((_read(each) for each in files_of(file) or [file]), key=lambda one: one.described.data_rank)
    ranks = found[0].described.data_ranks
    if [one.described.data_rank for one in found] != list(range(ranks)):
        raise DataError(
            f"{file}: the mini-batch has {ranks} files, one a data-parallel rank, and {len(found)} are beside it; put "
            "all of them into one folder"
        )
    return found


# What a pack has of its stage's layers, and what a dump has of all.
REPLAYED = {"replay_TLK": "replay_TAK", "gates_TLK": "gates_TAK", "held_TL": "held_TA"}


def _read(file: Path) -> Dump:
    try:
        with safe_open(file, framework="pt") as opened:
            described = json.loads((opened.metadata() or {})["minibatch"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return Dump(file, Described(**described), tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is no dump that can be replayed ({error}); give one that this version has written, whole"
        ) from error


def packs_of(dump: Dump, groups: Groups, layers: list[int]) -> list[TrainingPack]:
    """The packs on this process's device; layers: MoE layers of this stage. Collective over context ranks."""
    return [_pack(dump, number, groups, layers) for number in range(len(dump.described.samples))]


def _pack(dump: Dump, number: int, groups: Groups, layers: list[int]) -> TrainingPack:
    prefix, here = f"pack_{number}/", device().torch_device
    own = {name.removeprefix(prefix): value for name, value in dump.tensors.items() if name.startswith(prefix)}
    values = {field.name: own[field.name] for field in fields(Microbatch) if field.name in own}
    microbatch = Microbatch(**values, sample_indices=tuple(dump.described.samples[number]))
    on_device = {name: value.to(here) for name, value in own.items()}
    routes = on_device.get("old_routes_TAK")
    recording = None
    if routes is not None:
        log_probs_TLK = on_device["old_route_log_probs_TAK"][:, layers]
        own_scores = OwnScores(torch.zeros_like(log_probs_TLK[..., 0]), log_probs_TLK)  # whose margin no loss asks for
        recording = Recording(routes[:, layers], own_scores)
    whole = training_pack(microbatch.to(here), groups)
    replayed: dict[str, Any] = {
        name: on_device[all_of][:, layers] for name, all_of in REPLAYED.items() if all_of in on_device
    }
    of_old_policy: dict[str, Any] = {name: on_device.get(name) for name in OF_OLD_POLICY if groups.is_last_stage}
    return replace(
        whole,
        **of_old_policy,
        **replayed,
        recording=recording,
        estimates=_estimates(on_device) if groups.is_last_stage else None,
    )


def _estimates(own: Mapping[str, torch.Tensor]) -> Estimates | None:
    if "estimates/values_T" not in own:
        return None
    means = ValueMeans(*(own[f"estimates/means/{name}"] for name in ValueMeans._fields))
    return Estimates(**{name: own[f"estimates/{name}"] for name in ESTIMATES}, means=means)
