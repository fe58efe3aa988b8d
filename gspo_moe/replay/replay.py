"""Computes a skipped mini-batch again from its dump: forward, loss and backward, as the run did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import check_layout
from gspo_moe.config.schema import Config
from gspo_moe.config.training import ParallelConfig
from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError, NotReproduced
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.replicas import named_over_ranks
from gspo_moe.parallel.groups import Groups, initialize, world_size_from_environment
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.platform import megatron_version
from gspo_moe.replay.dump import Dump, packs_of, read_dumps
from gspo_moe.replay.sequences import SequenceFigures, sequence_figures, supervised_figures
from gspo_moe.routing.comparison import router_shift
from gspo_moe.routing.recorder import RouteRecorder, routers_of
from gspo_moe.training.dump import Described, Result
from gspo_moe.training.kept_weights import load_kept_weights
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.packs import Minibatch
from gspo_moe.training.step import MinibatchResult, PolicySettings, train_minibatch, train_supervised

LOSS = {"rl": "loss/policy", "sft": "sft/loss"}  # by the run's stage
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative: layouts add up in other orders


@dataclass(frozen=True)
class Figure:
    """What the run found, and what the replay did."""

    name: str
    run: float
    here: float

    def is_alike(self, tolerance: float) -> bool:
        if math.isfinite(self.run) and math.isfinite(self.here):
            return math.isclose(self.run, self.here, rel_tol=tolerance, abs_tol=tolerance)
        return math.isfinite(self.run) == math.isfinite(self.here)


@dataclass(frozen=True)
class Replayed:
    """weights: where they came from. skipped: whether this update too would have been.

    broken_weights, broken_gradients: names of parameters that are not finite, gradients as the backward pass meets
    them, with the first element and its value. parameters: how many there are. sequences: all of them, by sample.
    """

    file: Path
    described: Described
    weights: Path
    figures: tuple[Figure, ...]
    skipped: bool
    broken_weights: list[str]
    broken_gradients: list[str]
    parameters: int
    sequences: list[SequenceFigures]

    @property
    def is_reproduced(self) -> bool:
        tolerance = TOLERANCE[self.described.config["model"]["dtype"]]
        return self.skipped and all(figure.is_alike(tolerance) for figure in self.figures)


def check(found: Replayed) -> None:
    """Raises NotReproduced where the replay did not find what the run did."""
    if not found.is_reproduced:
        raise NotReproduced(
            "the mini-batch computed here is not what the run found: neither its data nor its weights broke it, but "
            "where it was computed, such as a device, a kernel or a collective; or this is another version"
        )


def replay(file: Path, weights: Path | None = None) -> Replayed:
    """Of the mini-batch that `file` is a dump of; on one process, or in the run's layout on as many. Collective.

    weights: in place of those that the dump names. Raises DataError, ConfigError and CheckpointError for a dump, a
    number of processes and weights that do not do.
    """
    dumps = read_dumps(file)
    described = dumps[0].described
    folder = weights or (None if described.weights is None else file.parent / described.weights)
    if folder is None:
        raise ConfigError(
            f"{file} has no weights beside it: checkpoint.keep=0 keeps none, nor does a full folder; give --weights, a "
            f"checkpoint of the weights that step {described.step} computed mini-batch {described.mini_batch} with"
        )
    config, architecture, groups = _join(described)
    model = build_model(config, architecture, groups, vocab=described.vocab, value_head=config.has_value_head)
    load_kept_weights(folder, model)
    named = named_over_ranks(model)
    broken_weights = _broken(named)
    mine = dumps if groups.layout.data == 1 else dumps[groups.data_rank : groups.data_rank + 1]
    minibatch = _minibatch(mine, described, model)
    settings = PolicySettings(config.algorithm, config.rollout.temperature, config.rollout.max_response_tokens)
    recorder, optimizer = None, Optimizer(config, model, 1)
    result: Result
    if config.stage == "sft":
        result = train_supervised(model, optimizer, minibatch)
    else:
        if config.algorithm.spec.router_shift:
            recorder = RouteRecorder(model.chunks, architecture, groups, scores=True)
        result = train_minibatch(model, optimizer, minibatch, settings, recorder)
    return Replayed(
        file,
        described,
        folder,
        _figures(described, result),
        result.update.skipped,
        broken_weights,
        _broken({name: _gradient_of(one) for name, one in reversed(named.items()) if one.requires_grad}),
        len(set().union(*gather_objects(list(named)))),
        _sequences(model, minibatch, result, settings, recorder),
    )


def _join(described: Described) -> tuple[Config, Architecture, Groups]:
    """Of the run, or in one process of a layout without parallelism."""
    config, world = validated(Config, described.config), world_size_from_environment()
    architecture = validated(Architecture, described.architecture)
    if world == 1:
        config = config.model_copy(update={"parallel": ParallelConfig()})
    layout = check_layout(config, architecture, world, megatron_version())
    if layout.data not in (1, described.data_ranks):
        raise ConfigError(
            f"{world} processes make {layout.data} data-parallel ranks, and the run had {described.data_ranks}; start "
            "one process, or as many as the run had"
        )
    return config, architecture, initialize(layout, config.seed, config.parallel.timeout_minutes)


def _minibatch(dumps: Sequence[Dump], described: Described, model: Model) -> Minibatch:
    layers = [router.layer_number - 1 for router in routers_of(model.chunks)]
    packs = [one for dump in dumps for one in packs_of(dump, model.groups, layers)]
    return Minibatch(tuple(packs), described.num_sequences, described.num_tokens)


def _figures(described: Described, result: Result) -> tuple[Figure, ...]:
    name = LOSS[described.config["stage"]]
    return (
        Figure("loss", float(described.metrics[name]), result.statistics.to_metrics()[name]),
        Figure("gradient norm", float(described.grad_norm), result.update.grad_norm),
    )


def _gradient_of(parameter: Any) -> torch.Tensor:
    """megatron-core's, in fp32."""
    gradient: torch.Tensor = parameter.main_grad
    return gradient


def _broken(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Those that are not finite, over all ranks, each once. Collective."""
    here = []
    for name, values in ((name, tensor.detach()) for name, tensor in tensors.items()):
        wrong = (~values.isfinite()).nonzero()
        if len(wrong):
            first = tuple(wrong[0].tolist())
            here.append(f"{name}{list(first)} = {float(values[first])}")
    ranks = gather_objects(here)
    return list(dict.fromkeys(one for of_rank in reversed(ranks) for one in of_rank))


def _sequences(
    model: Model,
    minibatch: Minibatch,
    result: Result,
    settings: PolicySettings,
    recorder: RouteRecorder | None,
) -> list[SequenceFigures]:
    """Of all ranks, by sample. Collective."""
    found: list[SequenceFigures] = []
    for one in result.packs:
        shift_T = None
        if recorder is not None and one.pack.recording is not None and one.recording is not None:
            shift_T = router_shift(one.pack.recording, one.recording, recorder.layers)
        if not model.groups.is_last_stage:
            continue
        if isinstance(result, MinibatchResult):
            found += sequence_figures(model, minibatch, one, settings, shift_T)
        else:
            found += supervised_figures(minibatch, one)
    every = {one.sample: one for of_rank in gather_objects(found) for one in of_rank}
    return [every[sample] for sample in sorted(every)]
