"""How a router makes weights of its logits: found from what it gave out, so that no model needs a file of its own.

A router scores its experts (softmax or sigmoid of the logits), picks K of them, and weighs those by their scores,
either divided by their sum or as they are, times a constant. Shape letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

LOG_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.float().log_softmax(dim=-1),
    "sigmoid": lambda logits_TE: logsigmoid(logits_TE.float()),
}


@dataclass(frozen=True)
class Gate:
    """scores: a key of `LOG_SCORES`. normalised: whether the K weights of a token add up to `scale` whatever it is."""

    scores: str
    normalised: bool
    scale: float

    def log_scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """ln of the router's score of every expert (nats), float32 [T, E]."""
        return LOG_SCORES[self.scores](logits_TE)

    def weights(self, logits_TE: torch.Tensor, routes_TK: torch.Tensor) -> torch.Tensor:
        """What the router would weigh these experts by, float32 [T, K]."""
        scores_TK = self.log_scores(logits_TE).gather(1, routes_TK).exp()
        if self.normalised:
            scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
        return scores_TK * self.scale


def find_gate(logits_TE: torch.Tensor, routes_TK: torch.Tensor, weights_TK: torch.Tensor) -> Gate | None:
    """The gate that made these weights [T, K] of these logits, padding left out; None where none of those above did.

    Weights may be rounded to any type: the gate must give them back within eight of its last digits.
    """
    tolerance = max(8 * torch.finfo(weights_TK.dtype).eps, 1e-4)
    weights_TK = weights_TK.float()
    best, least = None, tolerance
    for name, log_scores in LOG_SCORES.items():
        scores_TK = log_scores(logits_TE).gather(1, routes_TK).exp()
        share_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
        for normalised, base_TK in ((True, share_TK), (False, scores_TK)):
            scale = (weights_TK.sum() / base_TK.sum()).item()
            off = ((base_TK * scale - weights_TK).abs().amax() / weights_TK.amax()).item()
            if off < least:
                best, least = Gate(name, normalised, scale), off
    return best


def margin(scores_TE: torch.Tensor, routes_TK: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """The lowest score picked less the highest one not picked, float32 [T]; 0 against nothing where all are picked.

    scores_TE: what the choice was made by, in [0, 1] but for a bias. groups: of experts that stand together, of which
    a router picks some first (DeepSeek); experts of groups without a pick do not count.
    """
    picked_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, routes_TK, True)
    other_TE = ~picked_TE
    if groups > 1:
        picked_TG = picked_TE.view(len(picked_TE), groups, -1).any(dim=2)
        other_TE &= picked_TG.repeat_interleave(scores_TE.shape[1] // groups, dim=1)
    best_other_T = scores_TE.masked_fill(~other_TE, -torch.inf).amax(dim=1)
    lowest_T = scores_TE.gather(1, routes_TK).amin(dim=1)
    return lowest_T - torch.where(other_TE.any(dim=1), best_other_T, 0.0)
