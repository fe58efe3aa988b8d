"""Two snapshots of the same tokens: the figures of docs/spec.md, sections 4 and 5.

Shape letters: T tokens fed, M those whose routes count, L MoE layers, K experts a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gspo_moe.errors import DataError
from gspo_moe.routing.attribution import attribution, sequence_sums
from gspo_moe.routing.figures import Figures, pair_figures, with_interval
from gspo_moe.routing.volatility import PairSums, log_shift_TL, overlap_TL, set_change_NL
from gspo_moe.watching.snapshot import Snapshot


@dataclass(frozen=True)
class Comparison:
    """sums: of the routes. more: figures of log-probs, and phi and W with their intervals, by name."""

    sums: PairSums
    more: dict[str, float]

    @property
    def tokens(self) -> int:
        """How many tokens' routes were compared."""
        return int(self.sums.sums["tokens"].item())

    def to_metrics(self) -> dict[str, float | list[float]]:
        """All figures by their names in docs/spec.md; `slot_change` with the half of its 95 % interval."""
        return {**self.sums.to_metrics(), "slot_change_half_interval": self.sums.interval(), **self.more}

    def figures(self, pair: str, floor: Comparison | None = None) -> Figures:
        """Flat, as a trainer logs them: `routing/<pair>/...`; by layer in arrays. floor: of the same weights twice."""
        found = pair_figures(pair, self.sums, None if floor is None else floor.sums)
        found.metrics |= {f"routing/{pair}/{name}": value for name, value in self.more.items() if value == value}
        return with_interval(found, pair, self.sums)


def compare(old: Snapshot, new: Snapshot, held: Snapshot | None = None) -> Comparison:
    """How far `new` moved from `old`: the same tokens under two sets of weights, precisions or engines.

    held: of new's model with old's routes (`routes=old.routes_TLK`), for phi and W, which need log-probs of all three.
    Raises DataError where the tokens, the models or their routers' scores differ in form.
    """
    for other in (new, held):
        if other is not None:
            _check(old, other)
    old_MLK, new_MLK = old.routes_MLK.long(), new.routes_MLK.long()
    rows_M, row_M = torch.unique(old.masks.row_T[old.masks.routes_T], return_inverse=True)
    shift_ML = None
    if old.log_scores_MLE is not None and new.log_scores_MLE is not None:
        shift_ML = log_shift_TL(old.log_scores_MLE.gather(2, old_MLK), new.log_scores_MLE.gather(2, old_MLK))
    sums = PairSums.of_pack(
        overlap_TL(old_MLK, new_MLK),
        set_change_NL(old_MLK, new_MLK, row_M, len(rows_M), old.num_experts),
        row_M,
        old_MLK.shape[2],
        shift_ML,
        None if shift_ML is None or old.margin_ML is None else old.margin_ML.double(),
    )
    return Comparison(sums, _log_prob_figures(old, new, held))


def _log_prob_figures(old: Snapshot, new: Snapshot, held: Snapshot | None) -> dict[str, float]:
    if old.log_probs_T is None or new.log_probs_T is None:
        return {}
    counts_T = old.masks.targets_T
    change_T = (new.log_probs_T.double() - old.log_probs_T.double())[counts_T]
    figures = {
        "log_prob_change": change_T.mean().item(),
        "log_prob_change_abs": change_T.abs().mean().item(),
        "log_prob_change_max": change_T.abs().max().item(),
        "k3": (change_T.expm1() - change_T).mean().item(),
    }
    if held is None or held.log_probs_T is None:
        return figures
    _, row_T = torch.unique(old.masks.row_T[counts_T], return_inverse=True)
    held_T = held.log_probs_T.double()[counts_T]
    a_T, b_T = held_T - old.log_probs_T.double()[counts_T], new.log_probs_T.double()[counts_T] - held_T
    for name, (value, low, high) in attribution(sequence_sums(a_T, b_T, row_T, torch.ones_like(a_T))).items():
        figures |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return figures


def _check(old: Snapshot, other: Snapshot) -> None:
    if old.routes_TLK.shape != other.routes_TLK.shape or old.num_experts != other.num_experts:
        raise DataError(
            f"routes [tokens, layers, topk] differ: {list(old.routes_TLK.shape)} of {old.num_experts} experts and "
            f"{list(other.routes_TLK.shape)} of {other.num_experts}; compare one architecture over the same tokens"
        )
    same = torch.equal(old.masks.routes_T, other.masks.routes_T) and torch.equal(old.masks.row_T, other.masks.row_T)
    if old.token_ids_T is not None and other.token_ids_T is not None:
        same &= torch.equal(old.token_ids_T, other.token_ids_T)
    if not same:
        raise DataError("the snapshots are of other tokens, or count others; take both of one batch and its masks")
    for layer, was, now in zip(old.layers, old.scored_by or (), other.scored_by or (), strict=False):
        if was != now:
            raise DataError(
                f"{layer}: its weights fit {was} in one snapshot, {now} in the other; take longer texts or float32, by "
                "which they differ, or watch with scores=False"
            )
