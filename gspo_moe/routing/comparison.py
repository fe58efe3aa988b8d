"""Figures of recordings, put together over the pipeline's stages: SPEC section 4's for one pair of passes, and load.

All are collective over the pipeline, by way of `StageLayers.spread`.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, A all MoE layers, K experts a token, E experts,
N sequences of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gspo_moe.algorithms.lag import LagStatistics, sums_by_lag
from gspo_moe.routing.load import expert_load
from gspo_moe.routing.recorder import Recording
from gspo_moe.routing.shards import StageLayers
from gspo_moe.routing.volatility import PairSums, log_shift_TL, overlap_TL, set_change_NL
from gspo_moe.types import Microbatch


def compare(pack: Microbatch, old: Recording, new: Recording, layers: StageLayers) -> PairSums:
    """The figures of one pack's response tokens; those that need scores only where `old` has its own.

    With scores, `new` was recorded with old's routes as its reference.
    """
    mask_T, architecture = pack.route_mask_T, layers.architecture
    sequence_T = pack.sequence_T[mask_T]
    old_TLK, new_TLK = old.routes_TLK[mask_T], new.routes_TLK[mask_T]
    tokens_TL = [overlap_TL(old_TLK, new_TLK).double()]
    if old.own is not None and new.reference_log_probs_TLK is not None:
        tokens_TL += [log_shift_TL(old.own.log_probs_TLK[mask_T], new.reference_log_probs_TLK[mask_T])]
        tokens_TL += [old.own.margin_TL[mask_T].double()]
    set_change = set_change_NL(old_TLK, new_TLK, sequence_T, pack.num_sequences, architecture.num_experts)
    overlap, *scores = layers.spread(torch.stack(tokens_TL, dim=-1)).unbind(dim=-1)
    return PairSums.of_pack(overlap, layers.spread(set_change), sequence_T, architecture.num_experts_per_tok, *scores)


def compare_by_lag(
    pack: Microbatch, old: Recording, new: Recording, lag_T: torch.Tensor, lags: int, layers: StageLayers
) -> LagStatistics:
    """`slot_change` and `flip_rate` of one pack's response tokens by the lag of the token that each one led to.

    lag_T: int64, -1 where that is none of the policy's.
    """
    mask_T, topk = pack.route_mask_T & (lag_T >= 0), layers.architecture.num_experts_per_tok
    overlap_TA = layers.spread(overlap_TL(old.routes_TLK[mask_T], new.routes_TLK[mask_T]))
    values = {
        "slot_change": (1.0 - overlap_TA.double() / topk).mean(dim=1),
        "flip_rate": (overlap_TA < topk).double().mean(dim=1),
    }
    return LagStatistics(sums_by_lag(values, lag_T[mask_T], lags), {})


def router_shift(old: Recording, new: Recording, layers: StageLayers) -> torch.Tensor:
    """gamma of each token over all MoE layers, float64 [T]; exactly 1 where no score moved.

    Both with scores; `new` was recorded with old's routes as its reference.
    """
    assert old.own is not None
    assert new.reference_log_probs_TLK is not None
    return layers.spread(log_shift_TL(old.own.log_probs_TLK, new.reference_log_probs_TLK)).mean(dim=1).exp()


def expert_load_of(recordings: Sequence[Recording], layers: StageLayers) -> torch.Tensor:
    """Tokens of these recordings, at least one, that each expert got, int64 [A, E]."""
    experts = layers.architecture.num_experts
    load_LE = sum(expert_load(recording.routes_TLK, experts) for recording in recordings)
    assert isinstance(load_LE, torch.Tensor), "nothing was recorded"
    return layers.spread(load_LE[None])[0]


def gather_layers(routes_TLK: torch.Tensor, layers: StageLayers) -> torch.Tensor:
    """Recorded routes [T, A, K] of all layers, in the type of this stage's."""
    return layers.spread(routes_TLK.int()).to(routes_TLK.dtype)
