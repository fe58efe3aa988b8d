"""Measures the split of SPEC section 5 on a sample of a mini-batch's sequences, before its update.

Shape letters: T tokens of a pack, L this stage's MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gspo_moe.config.schema import Config
from gspo_moe.data.packing import subset
from gspo_moe.model.build import Model
from gspo_moe.parallel.reduce import from_last_stage, gather_over_data
from gspo_moe.routing.attribution import FIGURES, attribution, sequence_sums
from gspo_moe.routing.figures import Figures
from gspo_moe.scoring.score import score
from gspo_moe.training.packs import TrainingPack
from gspo_moe.types import Microbatch


def attribution_figures(model: Model, config: Config, packs: Sequence[TrainingPack], seed: int) -> Figures:
    """phi and W of these packs' log-ratios between the weights as they are and the old policy. Collective.

    One forward with own routes and one with those of the old log-probs, on `routing.attribution_sequences` sequences
    over all ranks. A figure that is not defined, as W where no route moved, is left out.
    """
    temperature, groups = config.rollout.temperature, model.groups
    count = -(-config.routing.attribution_sequences // groups.layout.data)
    few, old, routes = _sample(packs, count, seed + groups.data_rank)
    own = score(model, few, temperature=temperature, responses_only=True)

    def split(depth: int | None) -> np.ndarray:
        held = score(model, few, temperature=temperature, routes=routes, depth=depth, responses_only=True)
        sums = None
        if groups.is_last_stage:
            each = zip(few, held, old, own, strict=True)
            sums = np.concatenate(
                [sequence_sums(h - o, w - h, pack.sequence_T, pack.response_mask_T) for pack, h, o, w in each]
            )
            sums = np.concatenate(gather_over_data(sums, groups))
        whole: np.ndarray = from_last_stage(sums, groups)
        return whole

    sums = split(None)
    metrics = {"routing/attribution/sequences": float(len(sums))}
    found = attribution(sums, seed)
    for name, values in found.items():
        named = zip(("", "_low", "_high"), values, strict=True)
        metrics |= {f"routing/attribution/{name}{suffix}": value for suffix, value in named if value == value}
    figures = Figures(metrics)
    if config.routing.attribution_by_depth:
        depths = [attribution(split(depth)) for depth in range(1, model.architecture.num_hidden_layers)]
        for name in FIGURES:
            by_depth = [held[name][0] for held in depths] + [found[name][0]]
            figures.layers[f"routing/attribution/{name}"] = np.array(by_depth)
    return figures


def _sample(
    packs: Sequence[TrainingPack], count: int, seed: int
) -> tuple[list[Microbatch], list[torch.Tensor], list[torch.Tensor]]:
    """About `count` sequences of these packs at random, at least one of each: every rank runs as many packs.

    With each smaller pack come its old log-probs [T], on the last stage, and the routes [T, L, K] they were taken with.
    """
    generator = np.random.default_rng(seed)
    each = -(-count // len(packs))
    few, old, routes = [], [], []
    for one in packs:
        chosen, index_T = subset(one.pack, sorted(generator.permutation(one.pack.num_sequences)[:each].tolist()))
        few.append(chosen)
        routes.append(one.old_routes_TLK[index_T])
        if one.old_log_probs_T is not None:
            old.append(one.old_log_probs_T[index_T])
    return few, old, routes
