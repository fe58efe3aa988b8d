"""The losses' functions with every argument by its own name, as most of their tests write them."""

from __future__ import annotations

from typing import Any

import torch

from gspo_moe import algorithms
from gspo_moe.algorithms import (
    Algorithm,
    Correction,
    CorrectionStatistics,
    Counts,
    Extras,
    MismatchStatistics,
    PolicyLoss,
    Segments,
    Settings,
    algorithm_names,
    find_algorithm,
)
from gspo_moe.algorithms import gae as generalized
from gspo_moe.algorithms.ratios import SumOverContext, whole_sequences

SPECS = {name: find_algorithm(name) for name in algorithm_names()}
CLIPS = {name: spec.clips for name, spec in SPECS.items() if spec.clips is not None}
WHOLE_SEQUENCES = tuple(name for name, spec in SPECS.items() if spec.terms == "sequence")
SETTINGS = ("clip_low", "clip_high", "allow_wide_clip", "options", "dual_clip")
COUNTS = ("num_sequences", "num_tokens", "max_response_tokens")
EXTRAS = ("router_shift", "correction", "off_policy_mask", "kl", "entropy")


def policy_loss(
    algorithm: Algorithm | str,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    response_mask: torch.Tensor,
    sum_over_context: SumOverContext = whole_sequences,
    **more: Any,
) -> PolicyLoss:
    assert more.keys() <= {*SETTINGS, *COUNTS, *EXTRAS}
    return algorithms.policy_loss(
        algorithm,
        log_probs,
        old_log_probs,
        advantages,
        Segments.of_pack(cu_seqlens, response_mask, sum_over_context),
        Settings(**{name: more[name] for name in SETTINGS if name in more}),
        Counts(**{name: more[name] for name in COUNTS if name in more}),
        Extras(**{name: more[name] for name in EXTRAS if name in more}),
    )


def mismatch(log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, *pack: Any, **over: Any) -> MismatchStatistics:
    """pack: cu_seqlens and response_mask; over: sum_over_context."""
    return algorithms.mismatch(log_probs, rollout_log_probs, Segments.of_pack(*pack, **over))


def correct(
    kind: str,
    level: str,
    bounds: tuple[float, float],
    log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    *pack: Any,
    **over: Any,
) -> tuple[Correction, CorrectionStatistics]:
    return algorithms.correct(kind, level, bounds, log_probs, rollout_log_probs, Segments.of_pack(*pack, **over))


def gae(
    values: torch.Tensor,
    rewards: torch.Tensor,
    cu_seqlens: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return generalized.gae(values, rewards, Segments.of_pack(cu_seqlens, response_mask), gamma=gamma, lam=lam)
