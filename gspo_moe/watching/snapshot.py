"""What a model's routers did with some tokens, and what the model said of them. On the CPU; pure data.

Shape letters: T tokens fed, in the order of their rows, M those of them that count, L MoE layers, K experts a token,
E experts, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gspo_moe.errors import DataError


@dataclass(frozen=True)
class TokenMasks:
    """Which of the tokens fed count; all bool [T] but for the rows, int64 [T].

    A route counts where its token is of the response and another one follows it (docs/spec.md, section 4); a log-prob
    where the token that it is of is of the response.
    """

    routes_T: torch.Tensor
    targets_T: torch.Tensor
    row_T: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, response_mask: torch.Tensor | None = None) -> TokenMasks:
        """Both [rows, tokens], 1 or True on real tokens and on the response; without the latter all tokens count.

        Raises DataError for other shapes, and where no token counts.
        """
        real = attention_mask.detach().bool().cpu()
        response = real if response_mask is None else response_mask.detach().bool().cpu()
        if real.ndim != 2 or response.shape != real.shape:
            raise DataError("masks must be [rows, tokens], both of one shape; give 1 on real tokens, 1 on the response")
        last = torch.zeros_like(real[:, :1])
        follows = torch.cat([real[:, 1:], last], dim=1) & real
        routes = response & follows
        targets = torch.cat([response[:, 1:], last], dim=1) & follows
        if not routes.any():
            raise DataError("no token counts: none of the response has another one behind it; give longer responses")
        rows = torch.arange(len(real))[:, None].expand_as(real)
        return cls(routes.flatten(), targets.flatten(), rows.flatten())


@dataclass(frozen=True)
class Snapshot:
    """masks: of the tokens fed. routes_TLK: experts, int16, of all of them.

    log_scores_MLE, margin_ML: float32, the router's ln scores (nats) and what its choice was decided by, of the M
    tokens whose routes count; None without scores. log_probs_T: float32, of the token behind each one (nats), 0 where
    there is none; None without. token_ids_T: int64; None where they are not known. layers: the routers' names.
    scored_by: a key of `gates.LOG_SCORES` for each; None without scores.
    """

    masks: TokenMasks
    routes_TLK: torch.Tensor
    num_experts: int
    layers: tuple[str, ...]
    log_scores_MLE: torch.Tensor | None = None
    margin_ML: torch.Tensor | None = None
    log_probs_T: torch.Tensor | None = None
    token_ids_T: torch.Tensor | None = None
    scored_by: tuple[str, ...] | None = None

    @property
    def routes_MLK(self) -> torch.Tensor:
        return self.routes_TLK[self.masks.routes_T]


def join(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Snapshots of one model's micro-batches as one. What one of them lacks, all lose."""
    if not snapshots or len({(one.layers, one.num_experts, one.routes_TLK.shape[2]) for one in snapshots}) > 1:
        raise DataError("only snapshots of one model can be joined; give one or more")
    kinds = {one.scored_by for one in snapshots}
    if len(kinds - {None}) > 1:
        raise DataError("one snapshot read a router as softmax, another as sigmoid; join those of one watcher")
    counts = [int(one.masks.row_T.max()) + 1 for one in snapshots]
    rows = [one.masks.row_T + sum(counts[:index]) for index, one in enumerate(snapshots)]
    masks = TokenMasks(
        torch.cat([one.masks.routes_T for one in snapshots]),
        torch.cat([one.masks.targets_T for one in snapshots]),
        torch.cat(rows),
    )

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(one, name) for one in snapshots]
        return None if any(part is None for part in parts) else torch.cat(parts)

    optional = ("log_scores_MLE", "margin_ML", "log_probs_T", "token_ids_T")
    routes_TLK = torch.cat([one.routes_TLK for one in snapshots])
    first = snapshots[0]
    parts = {name: joined(name) for name in optional}
    scored_by = first.scored_by if len(kinds) == 1 else None
    return Snapshot(masks, routes_TLK, first.num_experts, first.layers, **parts, scored_by=scored_by)
