"""Measures the split of SPEC section 5 on a sample of a mini-batch's sequences, before its update.

Shape letters: T tokens of a pack, L this stage's MoE layers, A all MoE layers, K experts a token, N sequences.
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
from gspo_moe.scoring.score import score
from gspo_moe.training.routing import Figures
from gspo_moe.types import Microbatch


def attribution_figures(
    model: Model,
    config: Config,
    packs: Sequence[Microbatch],
    old_log_probs: Sequence[torch.Tensor],
    old_routes: Sequence[torch.Tensor],
    seed: int,
) -> Figures:
    """phi and W of these packs' log-ratios between the weights as they are and the old policy. Collective.

    old_log_probs: [T] a pack, on the last stage. old_routes: [T, L, K] a pack, those that old_log_probs were taken
    with. One forward with own routes and one replayed, on `routing.attribution_sequences` sequences over all ranks.
    A figure that is not defined, as W where no route moved, is left out.
    """
    temperature, groups = config.rollout.temperature, model.groups
    chosen = _sample(packs, -(-config.routing.attribution_sequences // groups.layout.data), seed + groups.data_rank)
    pairs = [subset(pack, sequences) for pack, sequences in zip(packs, chosen, strict=True)]
    few = [pack for pack, _ in pairs]
    routes = [routes_TLK[index_T] for routes_TLK, (_, index_T) in zip(old_routes, pairs, strict=True)]
    old = [values_T[index_T] for values_T, (_, index_T) in zip(old_log_probs, pairs, strict=False)]
    own = score(model, few, temperature=temperature)

    def split(depth: int | None) -> np.ndarray:
        held = score(model, few, temperature=temperature, routes=routes, depth=depth)
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


def _sample(packs: Sequence[Microbatch], count: int, seed: int) -> list[list[int]]:
    """About `count` sequences of these packs at random, at least one of each: every rank runs as many packs."""
    generator = np.random.default_rng(seed)
    each = -(-count // len(packs))
    return [sorted(generator.permutation(pack.num_sequences)[:each].tolist()) for pack in packs]
